"""Rows that ask about one passage are found, and stay on one side."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from adder.formatting.passages import LINE, MOST_ROWS, joined, passage_of_each, passages_of
from format_stage import format_rows, qa, reply, system, user
from rag_rows import passage, rag_rows


def hashes(*values):
    return np.array(values, dtype=np.uint64)


def test_the_longest_lines_of_what_a_user_says_are_looked_at():
    long, longer, longest = ("ab " * 40, "cd " * 50, "ef " * 60)

    def of(*texts, role="user"):
        return passages_of({"messages": [{"role": role, "content": text} for text in texts]})

    assert of(f"{long}\n{longer}\nq\n{longest}") == of(longest.upper(), longer) == of(longest)[:8] + of(longer)[:8]
    assert of("x" * (LINE - 1)) == of(longest, role="system") == passages_of({"text": longest}) == bytes(16)
    assert joined([of(longest), of("q")]).shape == (2, 2) and joined([]).shape == (0, 2)


def test_a_line_is_a_passage_where_several_rows_have_it_and_not_many():
    prompts, none = np.arange(1, 2001, dtype=np.uint64), np.zeros(2000, np.uint64)
    lines = np.zeros((2000, 2), np.uint64)
    lines[:, 0] = 7  # of a template
    lines[:20, 1], lines[20:40, 1], lines[40, 1] = 11, 12, 13
    found = passage_of_each(lines, none, prompts)
    assert (found[:20] == 11).all() and (found[20:40] == 12).all() and not found[40:].any()
    lines[: MOST_ROWS + 1, 1] = 11
    assert not passage_of_each(lines, none, prompts).any()
    systems = none.copy()
    systems[50:60] = 5
    found = passage_of_each(np.zeros((2000, 2), np.uint64), systems, prompts)
    assert (found[50:60] == 5).all() and np.count_nonzero(found) == 10


def test_rows_that_ask_the_same_are_about_the_same():
    none = np.zeros(40, np.uint64)
    prompts = np.arange(1, 41, dtype=np.uint64)
    lines = np.zeros((40, 2), np.uint64)
    lines[:4, 0] = 3
    prompts[:4] = 9  # one question, asked four times
    assert not passage_of_each(lines, none, prompts).any()
    prompts = np.arange(1, 41, dtype=np.uint64)
    systems = none.copy()
    systems[:3], systems[3:6] = 4, 5
    prompts[5] = prompts[0]  # under two system messages
    assert passage_of_each(np.zeros((40, 2), np.uint64), systems, prompts).tolist()[:7] == [0, 4, 4, 5, 5, 0, 0]
    assert passage_of_each(np.zeros((0, 2), np.uint64), none[:0], none[:0]).tolist() == []


FORMS = {
    "column": lambda p, q, a: {"context": p, "question": q, "answer": a},
    "prompt": lambda p, q, a: {"prompt": f"Answer from the text.\n\n{p}\n\nQuestion: {q}", "completion": a},
    "system": lambda p, q, a: {"messages": [system(p), user(q), reply(a)]},
    "messages": lambda p, q, a: {"messages": [user(f"{p}\n\n{q}"), reply(a)]},
}


@pytest.mark.parametrize("how", [{}, {"share": 0.2}, {"size": 100}])
@pytest.mark.parametrize("name", FORMS)
def test_rows_about_one_passage_are_on_one_side_and_none_is_lost(tmp_path, name, how):
    rows = [FORMS[name](row["context"], row["question"], row["answer"]) for row in rag_rows(50, 20)]
    made = format_rows(tmp_path, rows, how or {"share": 0.1}, overlap="drop", near_duplicates="report", max_leaked=0.02)
    card = made.card
    assert card["train"] + card["heldout"] == 1000
    wanted = {"share": 1000 * how.get("share", 0.1), **how}.get("size", 1000 * how.get("share", 0.1))
    assert wanted / 2 <= card["heldout"] <= (wanted if "size" in how else 2 * wanted)
    sides = {
        side: {
            number
            for number in range(50)
            if any(passage(number) in str(row["messages"]) for row in getattr(made, side))
        }
        for side in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"] and len(sides["train"] | sides["heldout"]) == 50
    assert "1,000 rows ask about 50 passages that several have in common" in card["split"]
    assert f"{card['heldout']:,} about {card['heldout'] // 20} passages are held out" in card["split"]
    groups = pq.read_table(made.out / "heldout.parquet").column("group").to_pylist()
    assert len(set(groups)) == card["heldout"] // 20


def test_passages_stay_apart_where_that_is_asked_for_or_a_column_decides(tmp_path):
    rows = [{**row, "day": n % 30} for n, row in enumerate(rag_rows(50, 20))]
    for name, how in (
        ("off", {"keep_passages": False}),
        ("group", {"group_by": "day"}),
        ("of", {"stratify_by": "day"}),
    ):
        made = format_rows(tmp_path / name, rows, {"share": 0.3, **how})
        assert "passage" not in made.card["split"], name


def test_few_passages_and_templates_leave_the_split_to_the_prompt(tmp_path):
    few = format_rows(tmp_path / "few", rag_rows(4, 100), {"size": 40})
    assert few.card["heldout"] == 40 and "passage" not in few.card["split"]
    template = "You are given a sentence. Say whether it is about sports, about the weather or about something else: "
    rows = [qa(f"{template}\n\n{n}") for n in range(300)]
    assert "passage" not in format_rows(tmp_path / "template", rows, {"size": 30}).card["split"]


def test_rows_of_a_passage_stay_where_they_are_when_others_are_added(tmp_path):
    rows = rag_rows(60, 15)
    old = format_rows(tmp_path / "old", rows[:600], {"share": 0.2})
    new = format_rows(tmp_path / "new", rows[::-1], {"share": 0.2})
    assert old.prompts("heldout") == new.prompts("heldout") & (old.prompts("heldout") | old.prompts("train"))
