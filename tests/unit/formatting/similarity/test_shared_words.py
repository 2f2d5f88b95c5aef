"""Words that many rows share are nobody's own."""

import random

import numpy as np
import pytest

from adder.core.errors import UserError
from adder.formatting.similarity.shared_words import SharedWords
from adder.formatting.similarity.words import hash_words
from format_stage import SENTENCE, format_rows, numbered, qa

WORDS = [
    f"{one}{other}" for one in ("ba", "ko", "ri", "su", "te") for other in ("lan", "mor", "nik", "pel", "quo", "rus")
]
TEMPLATES = (
    "What does the {} do with the {} near the {}?", "Who saw the {} and the {} behind the {} first?",
    "Where is the {} that the {} left at the {}?", "Which {} is older than the {} of the {}?",
)  # fmt: skip


def questions(passages: int, each: int, form: str) -> list[dict[str, object]]:
    """Rows of which several are about the same passage."""
    random_ = random.Random(1)
    rows = []
    for _ in range(passages):
        passage = " ".join(random_.choice(WORDS) for _ in range(80))
        for _ in range(each):
            asked, answer = (
                random_.choice(TEMPLATES).format(*random_.sample(WORDS, 3)),
                " ".join(random_.sample(WORDS, 4)),
            )
            if form == "column":
                rows.append({"context": passage, "question": asked, "answer": answer})
            elif form == "prompt":
                rows.append({"prompt": f"Read.\n\n{passage}\n\nQuestion: {asked}", "completion": answer})
            elif form == "system":
                rows.append({"system": passage, "question": asked, "answer": answer})
            else:
                rows.append(
                    {"system": f"{passage} {asked}", "question": "Answer what is asked above.", "answer": answer}
                )
    return rows


@pytest.mark.parametrize("form", ["column", "prompt", "system", "all in the system message"])
@pytest.mark.parametrize(("passages", "each"), [(50, 20), (100, 5), (30, 10)])
def test_rows_about_the_same_passage_do_not_leak(tmp_path, form, passages, each):
    rows = questions(passages, each, form)
    card = format_rows(tmp_path, rows, {"share": 0.1}, overlap="drop", max_leaked=0.02).card
    assert card["leaked"] <= 0.01 * len(rows) and card["train"] > 0.8 * len(rows)


def test_rows_of_one_template_do_not_leak(tmp_path):
    random_ = random.Random(2)
    rows = [
        qa(
            f"{SENTENCE}. Show the {a} of all rows where {b} is greater than {random_.randrange(900)} by {c}",
            f"answer {n}",
        )
        for n in range(300)
        for a, b, c in [random_.sample(WORDS, 3)]
    ]
    assert format_rows(tmp_path, rows, {"share": 0.1}, overlap="drop").card["leaked"] <= 6


def test_the_same_question_about_a_shared_passage_leaks_still(tmp_path):
    rows = questions(50, 20, "column")
    held, copies = rows[::20], [{**row, "question": f"Please: {row['question']}"} for row in rows[:400:20]]
    given = [*(("train", row) for row in rows if row not in held), *(("train", row) for row in copies)]
    numbered_rows = [
        {"source": split, "row": n, "split": split, "data": row}
        for n, (split, row) in enumerate([*given, *(("heldout", row) for row in held)], 1)
    ]
    leaked = format_rows(tmp_path, numbered_rows, overlap="drop").leaked
    assert {row["row"] for row in leaked} >= set(range(len(given) - 19, len(given) + 1))
    assert len(leaked) <= 25


def test_many_leaks_stop_the_run_with_the_rule_and_the_settings(tmp_path):
    rows = [("train", qa(f"question number {n % 20}", f"a {n}")) for n in range(40)]
    rows += [("heldout", qa(f"question number {n}", "b")) for n in range(10)]
    rows = [{"source": split, "row": n, "split": split, "data": row} for n, (split, row) in enumerate(rows, 1)]
    expected = (
        r"20 of 40 training rows \(50.0%\) .* 20 by same prompt \(first: train:1 and heldout:41\).*group_by.*overlap"
    )
    with pytest.raises(UserError, match=expected):
        format_rows(tmp_path / "stopped", rows, max_leaked=0.05)
    assert format_rows(tmp_path / "allowed", rows, max_leaked=0.5).card["leaked"] == 20


def test_words_are_shared_where_more_rows_than_a_few_have_the_sequence():
    held = [f"{SENTENCE} {numbered(0, 9)}"]
    words, offsets = hash_words(held)
    shared = SharedWords(words, offsets)
    shared.add(shared.look([f"{SENTENCE} {numbered(100 + 10 * n, 9)}" for n in range(4)]))
    assert shared.own().all()
    shared.add(shared.look([f"{SENTENCE} {numbered(1, 7)}", "", "other"]))
    assert np.flatnonzero(shared.own()).tolist() == list(range(len(SENTENCE.split()), len(words)))
