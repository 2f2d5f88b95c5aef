"""The stage "format": every row in exactly one class, duplicates, leaks, weights, and a split that stays put."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adder.core import parallel
from adder.core.errors import UserError
from adder.core.files import digest_file, read_json, read_jsonl, read_table, write_json, write_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
from adder.data import fetch_rows
from adder.data.stage import RowSettings, Source
from adder.formatting import block_converter
from adder.formatting import heldout_split as split
from adder.formatting import run as format

ROOT = Path(__file__).resolve().parents[3]
SNIPS = ROOT.parent / "shared" / "data" / "snips"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
needs_shared_data = pytest.mark.skipif(not SNIPS.exists(), reason="../shared/data is not here")


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def qa(question, answer="yes", **more):
    return {"question": question, "answer": answer, **more}


class Formatted:
    """What one run of the stage wrote."""

    def __init__(self, out: Path):
        self.out = out
        self.card = read_json(out / "card.json")
        self.train, self.heldout = (self.rows(name) for name in ("train", "heldout"))
        self.rejects, self.duplicates, self.leaked, self.near_duplicates = (
            list(read_jsonl(out / f"{name}.jsonl")) for name in ("rejects", "duplicates", "leaked", "near_duplicates")
        )

    def rows(self, split):
        """Rows of one file, with the messages of each."""
        rows = read_table(self.out / f"{split}.parquet").to_pylist()
        for row in rows:
            row |= json.loads(row["conversation"])
        return rows

    def prompts(self, split):
        return {row["messages"][-2]["content"] for row in getattr(self, split)}

    def ids(self, split):
        return [row["id"] for row in getattr(self, split)]


PLAIN = {
    "system_prompt": None,
    "max_rejected": 1.0,
    "drop_duplicates": True,
    "near_duplicates": "off",
    "near_duplicate_similarity": 0.8,
    "overlap": "off",
    "overlap_share": 0.5,
}


def run(tmp_path, records, heldout=None, reading=None, progress=None, **changes) -> Formatted:
    """Run the stage over records: rows as dictionaries, or (split, row), or whole records.

    heldout: {share}, {size}, ...; reading: {source: {row_format, columns, weight}}; changes of the stage's settings.
    """
    data, out = tmp_path / "data", tmp_path / "format"
    data.mkdir(parents=True)
    out.mkdir()
    whole = []
    for number, record in enumerate(records, 1):
        split, row = record if isinstance(record, tuple) else (None, record)
        is_whole = "source" in row
        whole.append(row if is_whole else {"source": "rows", "row": number, "split": split, "data": row})
    # Escaped as a stranger would write it, so that half surrogate pairs get here too.
    (data / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in whole))
    names = {record["source"]: {} for record in whole}
    plain = {"row_format": "auto", "columns": {}, "weight": 1.0}
    write_json(data / "reading.json", {name: plain | (reading or {}).get(name, {}) for name in names})
    heldout = {"share": None, "size": None, "group_by": None, "stratify_by": None, **(heldout or {})}
    summary = format.run({**PLAIN, "heldout": heldout, **changes}, {"data": data}, out, progress or Progress.silent())
    formatted = Formatted(out)
    assert summary == {name: formatted.card[name] for name in format.COUNTS}
    assert_all_accounted_for(formatted)
    return formatted


def assert_all_accounted_for(formatted):
    """Every row is in exactly one class, and the files hold what the card says."""
    card = formatted.card
    for counts in [card, *card["by_source"].values()]:
        assert counts["rows_in"] == sum(counts[name] for name in (*format.CLASSES, "rejected"))
    assert card["accepted"] == card["train"] + card["heldout"]
    assert card["rejected"] == sum(card["rejects_by_reason"].values()) == len(formatted.rejects)
    assert card["train_rows"] == card["train"] + card["repeats"] == len(formatted.train)
    assert card["duplicates"] == len(formatted.duplicates)
    assert card["heldout"] == len(formatted.heldout)
    assert card["leaked"] == sum(row["dropped"] for row in formatted.leaked)
    assert card["near_duplicates"] == sum(row["dropped"] for row in formatted.near_duplicates)
    ids = formatted.ids("train") + formatted.ids("heldout")
    assert len(set(ids)) == len(ids)
    assert sorted(path.name for path in formatted.out.iterdir()) == FILES


FILES = [
    *("card.json", "duplicates.jsonl", "heldout.parquet", "leaked.jsonl", "near_duplicates.jsonl"),
    *("rejects.jsonl", "train.parquet"),
]


# Rows and rejects


def test_system_prompt_is_added_only_where_there_is_none(tmp_path):
    rows = [{"messages": [system("own"), user("a"), reply("b")]}, {"messages": [user("c"), reply("d")]}]
    formatted = run(tmp_path, rows, {"size": 1}, system_prompt="general")
    systems = {row["messages"][1]["content"]: row["messages"][0] for row in formatted.train + formatted.heldout}
    assert systems == {"a": system("own"), "c": system("general")}


def test_rejects_name_row_reason_and_data(tmp_path):
    unreadable = {"source": "b", "row": 17, "split": None, "error": "broken JSON at line 17", "raw": '{"a'}
    rows = [qa("1"), qa("2"), {"prompt": "p", "completion": "c"}, qa("3", ""), qa("\ud800"), unreadable]
    formatted = run(tmp_path, rows, {"size": 1})
    assert [(row["source"], row["row"]) for row in formatted.rejects] == [
        ("rows", 3),
        ("rows", 4),
        ("rows", 5),
        ("b", 17),
    ]
    assert "most rows there have question + answer" in formatted.rejects[0]["reason"]
    assert formatted.rejects[1] == {
        "source": "rows",
        "row": 4,
        "reason": "content is empty: answer",
        "data": qa("3", ""),
    }
    assert json.loads(formatted.rejects[2]["data"]) == qa("\ud800")
    assert formatted.rejects[3]["reason"] == "unreadable row: broken JSON at line 17"
    assert formatted.rejects[3]["data"] == '{"a'
    assert formatted.card["row_format"] == {"rows": "question_answer", "b": None}
    assert formatted.card["rejects_by_reason"]["unreadable row"] == 1


def test_too_many_rejects_stop_the_run_with_the_reasons(tmp_path):
    rows = [qa(str(n)) for n in range(8)] + [qa("bad", "")] * 2
    expected = (
        r"2 of 10 rows \(20.0%\) can't be used, more than format.max_rejected allows \(10.0%\)(.|\n)*"
        r"2 rows: content is empty: answer \(first: rows, row 9: \{'question': 'bad', 'answer': ''\}\)"
    )
    with pytest.raises(UserError, match=expected):
        run(tmp_path / "few", rows, {"size": 1}, max_rejected=0.1)
    assert run(tmp_path / "enough", rows, {"size": 1}, max_rejected=0.2).card["rejected"] == 2


def test_columns_are_mapped_and_formats_named_for_each_source(tmp_path):
    rows = [
        {"source": "math", "row": 1, "split": "train", "data": {"problem": "1+1", "solution": "2"}},
        {"source": "pairs", "row": 1, "split": "train", "data": {"prompt": "p", "chosen": "c", "rejected": "r"}},
        {"source": "books", "row": 1, "split": "train", "data": {"text": "Once.", "label": "x"}},
        {"source": "held", "row": 1, "split": "heldout", "data": qa("q")},
    ]
    reading = {
        "math": {"columns": {"question": "problem", "answer": "solution"}},
        "pairs": {"row_format": "preference"},
        "books": {"row_format": "text"},
    }
    formatted = run(tmp_path, rows, reading=reading)
    assert [json.loads(row["conversation"]) for row in formatted.train] == [
        {"messages": [user("1+1"), reply("2")]},
        {"messages": [user("p"), reply("c")]},
        {"text": "Once."},
    ]
    assert formatted.card["row_format"] == {
        "math": "question_answer", "pairs": "preference", "books": "text", "held": "question_answer"
    }  # fmt: skip


def test_numbers_and_nesting_that_json_cannot_hold_are_rejected(tmp_path):
    deep = []
    for _ in range(400):
        deep = [deep]
    rows = [
        {"messages": [user("q"), reply("a")], "tools": json.dumps([{"name": "f", "parameters": {"x": value}}])}
        for value in (2**70, deep, 3)
    ]
    rows += [
        {
            "messages": [
                user("q"),
                {**reply("a"), "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}]},
            ]
        }
        for value in (2**70, 2**63)
    ]
    heldout = ("heldout", {"messages": [user("h"), reply("a")]})
    formatted = run(tmp_path, [*(("train", row) for row in rows), heldout])
    assert [row["row"] for row in formatted.rejects] == [1, 2, 4]
    assert formatted.train[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 2**63}


# Duplicates and leaks


def test_duplicates_whatever_their_case_and_spacing_are_dropped_and_the_first_stays(tmp_path):
    rows = [qa("a b"), qa("b"), qa("a b"), qa(" A\n b"), qa("a b", "no"), qa("ab"), qa("A B")]
    formatted = run(tmp_path, rows, {"size": 1})
    dropped = [(row["row"], row["matches"]) for row in formatted.duplicates]
    assert dropped == [(3, "rows:1"), (4, "rows:1"), (7, "rows:1")]
    example = formatted.card["quality"]["duplicates"]["examples"][0]
    assert example == {"id": "rows:3", "matches": "rows:1", "text": "user: a b\nassistant: yes"}


def test_what_makes_conversations_different(tmp_path):
    """Tools, calls, reasoning and marks count; the identities of calls, drawn anew for each copy, do not."""

    def calling(identity, arguments, **more):
        call = {"id": identity, "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        turns.append({"role": "tool", "tool_call_id": identity, "content": "r"})
        return {"messages": [*turns, {**reply("a"), **more}]}

    rows = [
        *(calling("1", {"x": 1}), calling("2", {"x": 1}), calling("1", {"x": 2})),
        *(calling("1", {"x": 1}, reasoning="r"), calling("1", {"x": 1}, weight=0)),
        {**calling("1", {"x": 1}), "tools": [{"name": "f"}]},
    ]
    formatted = run(tmp_path, [("train", row) for row in rows] + [("heldout", {"messages": [user("h"), reply("a")]})])
    assert [row["row"] for row in formatted.duplicates] == [2]


@given(st.text(st.one_of(st.characters(max_codepoint=127), st.characters(), st.sampled_from(" \n\t")), max_size=30))
def test_normalise_is_casefold_with_single_spaces(text):
    try:
        expected = " ".join(text.casefold().split()).encode()
    except UnicodeEncodeError:
        return
    assert block_converter.normalise(text) == expected


def test_duplicates_stay_when_asked(tmp_path):
    rows = [("train", qa("a")), ("train", qa("a")), ("heldout", qa("b"))]
    formatted = run(tmp_path, rows, drop_duplicates=False)
    assert formatted.card["train"] == 2 and not formatted.duplicates


def test_training_copies_of_heldout_prompts_are_dropped(tmp_path):
    rows = [
        ("train", qa("What is  LoRA?", "x")),  # other case, spacing and answer
        ("train", {"messages": [system("s"), user("what is lora?"), reply("y")]}),  # a system message does not hide it
        ("train", qa("What is QLoRA?")),
        ("train", qa("What is QLoRA?")),
        ("heldout", qa("what is lora?", "z")),
        ("heldout", qa("what is lora?", "z")),
        ("heldout", qa("WHAT is lora?", "w")),
    ]
    numbered = [
        {"source": "chat" if "messages" in row else split, "row": n, "split": split, "data": row}
        for n, (split, row) in enumerate(rows, 1)
    ]
    formatted = run(tmp_path, numbered)
    assert [(row["row"], row["matches"]) for row in formatted.leaked] == [(1, "heldout:5"), (2, "heldout:5")]
    assert [row["row"] for row in formatted.duplicates] == [4, 6]
    assert [row["id"] for row in formatted.train] == ["train:3"]
    assert [row["id"] for row in formatted.heldout] == ["heldout:5", "heldout:7"]
    assert formatted.card["heldout_in_train"] == 3  # as the data came, the repeated one included
    assert {(row["how"], row["share"]) for row in formatted.leaked} == {("same prompt", 1.0)}


def test_rows_of_a_test_set_only_protect(tmp_path):
    rows = [
        ("test", qa("What is LoRA?")),
        ("test", qa("What is LoRA?", 3)),  # neither a reply that is no text nor a repeated row matters
        ("test", qa("What is LoRA?")),
        ("train", qa("what is lora?")),
        ("train", qa("what is loss?")),
        ("heldout", qa("what is a rank?")),
    ]
    formatted = run(tmp_path, rows)
    assert [(row["row"], row["matches"]) for row in formatted.leaked] == [(4, "rows:1")]
    assert formatted.card["tests"] == 3
    assert formatted.ids("train") == ["rows:5"] and formatted.ids("heldout") == ["rows:6"]


def test_rows_that_ask_nothing_do_not_leak(tmp_path):
    rows = [
        ("train", {"messages": [reply("one")]}),
        ("train", {"text": "two"}),
        ("heldout", {"messages": [reply("three")]}),
    ]
    records = [{"source": f"s{n}", "row": n, "split": split, "data": row} for n, (split, row) in enumerate(rows)]
    formatted = run(tmp_path, records)
    assert formatted.card["train"] == 2
    assert formatted.card["samples"][0] in ([reply("one")], [{"role": "text", "content": "two"}])


LONG = "the quick brown fox jumps over the lazy dog and then sleeps under the old apple tree until {} o'clock in may"
LONGER = "Please read: " + LONG


@pytest.mark.parametrize("action", ["drop", "report", "off"])
def test_training_prompts_that_overlap_with_held_out_or_test_ones(tmp_path, action):
    rows = [
        ("train", qa(LONGER.format("three"), "1")),
        ("train", qa("something else that has nothing to do with any animal at all, nor with trees", "2")),
        ("heldout", qa(LONG.format("five"), "3")),
        ("test", qa("a prompt of a test set that nobody else has ever thought of at all", "4")),
        (
            "train",
            {"messages": [user("well, a prompt of a test set that nobody else has ever thought of"), reply("5")]},
        ),
    ]
    numbered = [
        {"source": "chat" if "messages" in row else "rows", "row": n, "split": split, "data": row}
        for n, (split, row) in enumerate(rows, 1)
    ]
    formatted = run(tmp_path, numbered, overlap=action)
    found = [] if action == "off" else [(1, "rows:3", "8-word overlap"), (5, "rows:4", "8-word overlap")]
    assert [(row["row"], row["matches"], row["how"]) for row in formatted.leaked] == found
    assert all(0.5 < row["share"] < 1 for row in formatted.leaked)
    assert formatted.ids("train") == (["rows:2"] if action == "drop" else ["rows:1", "rows:2", "chat:5"])
    overlap = formatted.card["quality"]["overlap"]
    assert (overlap["found"], overlap["dropped"]) == (len(found), len(found) if action == "drop" else 0)
    if found:
        assert overlap["examples"][0]["train"]["id"] == "rows:1"
        assert overlap["examples"][0]["heldout"]["text"].startswith("user: the quick brown fox")


@pytest.mark.parametrize("action", ["drop", "report", "off"])
def test_near_duplicates_within_training(tmp_path, action):
    story = " ".join(f"word{n}" for n in range(80))
    rows = [
        ("heldout", qa("a held-out question about something else", "c")),
        ("train", qa(story + " one", "a")),
        ("train", qa("quite another question about another matter", "b")),
        ("heldout", qa(story + " two", "c")),  # never dropped, and no reason to drop another
        ("train", qa(story + " three", "d")),
        ("train", qa("a third question, which is like no other of them", "d")),
        ("train", qa(story + " four", "e")),
    ]
    formatted = run(tmp_path, rows, near_duplicates=action)
    found = [] if action == "off" else [(5, "rows:2"), (7, "rows:2")]
    assert [(row["row"], row["matches"]) for row in formatted.near_duplicates] == found
    assert all(0.8 <= row["similarity"] <= 1 for row in formatted.near_duplicates)
    assert formatted.card["near_duplicates"] == (2 if action == "drop" else 0)
    assert formatted.ids("train") == [f"rows:{n}" for n in ([2, 3, 6] if action == "drop" else [2, 3, 5, 6, 7])]
    told = formatted.card["quality"]["near_duplicates"]
    assert (told["found"], told["dropped"]) == (len(found), formatted.card["near_duplicates"])
    if found:
        example = told["examples"][0]
        assert (example["a"]["id"], example["b"]["id"]) == ("rows:5", "rows:2")
        assert example["a"]["text"].startswith("user: word0 word1")


# Weights


def test_weights_repeat_and_leave_out_training_rows(tmp_path):
    rows = [
        {"source": name, "row": n, "split": split, "data": qa(f"{name} {n}")}
        for name, split in (("half", "train"), ("once", "train"), ("more", "train"), ("held", "heldout"))
        for n in range(1, 401)
    ]
    reading = {"half": {"weight": 0.5}, "more": {"weight": 2.25}, "held": {"weight": 3.0}}
    formatted = run(tmp_path, rows, reading=reading)
    card = formatted.card
    assert 160 < card["by_source"]["half"]["train"] < 240
    assert card["left_out"] == card["by_source"]["half"]["left_out"] == 400 - card["by_source"]["half"]["train"]
    assert card["heldout"] == 400
    copies = Counter(row["id"].split("#")[0] for row in formatted.train if row["source"] == "more")
    assert len(copies) == 400 and set(copies.values()) == {2, 3}
    assert 60 < sum(count == 3 for count in copies.values()) < 140
    assert card["repeats"] == sum(copies.values()) - 400
    assert {"more:1", "more:1#2"} <= set(formatted.ids("train"))
    digests = [row["digest"] for row in formatted.train]
    assert len(set(digests)) == len(digests)
    by_row = defaultdict(set)
    for row in formatted.train:
        by_row[row["id"].split("#")[0]].add(row["conversation"])
    assert all(len(conversations) == 1 for conversations in by_row.values())

    fewer = run(tmp_path / "fewer", [row for row in rows if row["row"] <= 200], reading=reading)
    kept = {row["id"] for row in formatted.train if int(row["id"].split(":")[1].split("#")[0]) <= 200}
    assert kept == {row["id"] for row in fewer.train}  # other rows don't matter


def test_weights_say_nothing_of_which_digests_are_drawn(tmp_path):
    """Samples take the lowest digests: half a source must not be its lower half."""
    digest = np.random.default_rng(1).integers(0, 2**63, 20_000, dtype=np.uint64) * np.uint64(2)
    kept = digest[split.copies_of(digest, np.full(len(digest), 0.5)) == 1]
    assert abs(len(kept) - 10_000) < 400
    assert abs((kept < 2**63).mean() - 0.5) < 0.03


def test_multi_turn_prompts_leak_only_when_the_whole_prompt_is_the_same(tmp_path):
    talk = [user("hi"), reply("hello"), user("more?"), reply("no")]
    other = [user("hi"), reply("good day"), user("more?"), reply("no")]
    rows = [
        ("train", {"messages": talk}),
        ("train", {"messages": other}),
        ("heldout", {"messages": talk[:3] + [reply("yes")]}),
    ]
    formatted = run(tmp_path, rows)
    assert [row["row"] for row in formatted.leaked] == [1]
    assert formatted.train[0]["messages"] == other


# The split


QUESTIONS = [f"question {number}" for number in range(400)]


def test_share_split_of_old_rows_is_untouched_by_new_ones(tmp_path):
    old = run(tmp_path / "old", [qa(q) for q in QUESTIONS[:200]], {"share": 0.2})
    new = run(tmp_path / "new", [qa(q) for q in reversed(QUESTIONS)], {"share": 0.2})
    assert old.prompts("heldout") == new.prompts("heldout") & set(QUESTIONS[:200])
    assert 20 <= len(old.heldout) <= 60
    assert 50 <= len(new.heldout) <= 110


def test_a_larger_share_only_adds_to_the_held_out_rows(tmp_path):
    small = run(tmp_path / "small", [qa(q) for q in QUESTIONS], {"share": 0.1})
    large = run(tmp_path / "large", [qa(q) for q in QUESTIONS], {"share": 0.3})
    assert small.prompts("heldout") < large.prompts("heldout")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 60).map(str), min_size=4, max_size=30),
    st.integers(0, 60).map(str),
    st.integers(1, 3),
    st.integers(0, 30),
)
def test_one_new_row_displaces_at_most_one_of_a_fixed_size(tmp_path_factory, questions, new, size, place):
    tmp_path = tmp_path_factory.mktemp("size")
    old_rows = [qa(q, f"answer {n % 2}") for n, q in enumerate(questions)]
    if len({json.dumps(row) for row in old_rows}) <= size or len(set(questions)) <= size:
        return
    new_rows = old_rows[:place] + [qa(new, "a new answer")] + old_rows[place:]
    before = run(tmp_path / "before", old_rows, {"size": size})
    after = run(tmp_path / "after", new_rows, {"size": size})
    texts_before, texts_after = ({json.dumps(row["messages"]) for row in f.heldout} for f in (before, after))
    assert len(texts_before) == len(texts_after) == size
    assert len(texts_before - texts_after) <= 1


def test_a_prompt_never_stands_on_both_sides(tmp_path):
    rows = [qa(q.upper() if n % 2 else q, str(n)) for n, q in enumerate(QUESTIONS[:30] * 4)]
    for name, how in (("share", {"share": 0.3}), ("size", {"size": 37})):
        formatted = run(tmp_path / name, rows, how)
        heldout, train = ({q.casefold() for q in formatted.prompts(split)} for split in ("heldout", "train"))
        assert not heldout & train
        assert heldout and train
    assert formatted.card["heldout"] == 37


def test_heldout_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.heldout.size is 3, but there are only 3 usable rows"):
        run(tmp_path, [qa("a"), qa("b"), qa("c"), qa("c")], {"size": 3})


def test_groups_stay_together_and_stay_put(tmp_path):
    rows = [qa(q, author=f"author {n % 37}" if n % 5 else None) for n, q in enumerate(QUESTIONS)]
    author = {row["question"]: row["author"] for row in rows}
    small = run(tmp_path / "small", rows[:200], {"share": 0.3, "group_by": "author"})
    large = run(tmp_path / "large", rows, {"share": 0.3, "group_by": "author"})
    sized = run(tmp_path / "sized", rows, {"size": 50, "group_by": "author"})
    for formatted in (small, large, sized):
        sides = {side: {author[q] for q in formatted.prompts(side)} for side in ("train", "heldout")}
        assert sides["train"] & sides["heldout"] == {None}  # those without an author go one by one
        assert len(sides["heldout"]) > 1
    assert small.prompts("heldout") == large.prompts("heldout") & {row["question"] for row in rows[:200]}
    assert sized.card["heldout"] == 50
    assert "'author'" in large.card["split"]
    # Which rows are of one author is told to the evaluation; those without one belong to none but themselves.
    heldout = pq.read_table(large.out / "heldout.parquet").to_pylist()
    by_group = {}
    for row in heldout:
        question = json.loads(row["conversation"])["messages"][0]["content"]
        by_group.setdefault(row["group"], []).append(author[question])
    assert all(len(set(found)) == 1 for found in by_group.values())
    assert sum(None in found for found in by_group.values()) == sum(found.count(None) for found in by_group.values())
    assert len(by_group) - sum(None in found for found in by_group.values()) == len(
        {author[q] for q in large.prompts("heldout")} - {None}
    )
    assert "group" not in pq.read_schema(large.out / "train.parquet").names


def test_a_value_is_one_group_however_it_is_written(tmp_path):
    rows = [qa(q, user=(7, 7.0, "7")[n % 3]) for n, q in enumerate(QUESTIONS[:30])]
    with pytest.raises(UserError, match="size is 5, but the smallest group of `group_by: user` has 30 rows"):
        run(tmp_path, rows, {"size": 5, "group_by": "user"})


def test_each_value_is_held_out_by_the_same_share(tmp_path):
    rows = [qa(q, intent="rare" if n % 10 == 0 else "common", n=n) for n, q in enumerate(QUESTIONS)]
    intent = {row["question"]: row["intent"] for row in rows}
    for name, how in (("share", {"share": 0.25}), ("size", {"size": 100})):
        formatted = run(tmp_path / name, rows, {**how, "stratify_by": "intent"})
        counts = Counter(intent[q] for q in formatted.prompts("heldout"))
        assert abs(counts["rare"] - 10) <= 1 and abs(counts["common"] - 90) <= 1
    assert formatted.card["heldout"] == 100

    added = run(
        tmp_path / "added", [*rows, qa("a new question", intent="rare")], {"share": 0.25, "stratify_by": "intent"}
    )
    before = run(tmp_path / "before", rows, {"share": 0.25, "stratify_by": "intent"})
    moved = before.prompts("heldout") - added.prompts("heldout")
    assert len(moved) <= 1 and all(intent[q] == "rare" for q in moved)


def test_values_of_few_rows_are_held_out_on_the_average():
    value = np.repeat(np.random.default_rng(1).integers(1, 2**63, 1000, dtype=np.uint64), 3)
    prompt, digest = np.random.default_rng(2).integers(1, 2**63, (2, 3000), dtype=np.uint64)
    held = split.choose_heldout({"share": 0.1, "stratify_by": "x"}, prompt, digest, value)
    assert 240 < held.sum() < 360


def test_a_split_column_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="group_by names the column 'autor', which no row has.*answer, author, question"
    ):
        run(tmp_path, [qa("a", author="x")], {"size": 1, "group_by": "autor"})


def test_no_way_to_hold_out_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs one of share, size and sources"):
        run(tmp_path, [qa("a"), qa("b")])


def test_empty_sets_are_refused_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no row can be used(.|\n)*2 rows: unknown row format: columns x"):
        run(tmp_path / "none", [{"x": "a"}, {"x": "b"}], {"size": 1})
    with pytest.raises(UserError, match="no row can be used"):
        run(tmp_path / "nothing", [], {"size": 1})
    with pytest.raises(UserError, match=r"no row is held out: 1 to train on(.|\n)*content is empty: answer"):
        run(tmp_path / "heldout", [("train", qa("a")), ("heldout", qa("b", ""))])
    with pytest.raises(UserError, match="no row is left to train on: 1 held out, 0 duplicates, 1 also held out"):
        run(tmp_path / "train", [("train", qa("a")), ("heldout", qa("A"))])
    with pytest.raises(UserError, match="share 1e-09 of few rows"):
        run(tmp_path / "share", [qa("a"), qa("b")], {"share": 1e-9})


def test_same_rows_give_the_same_bytes(tmp_path):
    rows = [qa(q) for q in QUESTIONS[:50]] + [qa("x", ""), qa(QUESTIONS[0])]
    first, second = (run(tmp_path / name, rows, {"share": 0.2}) for name in ("first", "second"))
    for name in FILES:
        assert digest_file(first.out / name) == digest_file(second.out / name), name


def test_samples_are_three_training_conversations(tmp_path):
    formatted = run(tmp_path, [qa(q) for q in QUESTIONS[:20]], {"size": 2})
    trained = [row["messages"] for row in formatted.train]
    assert len(formatted.card["samples"]) == 3
    assert all(sample in trained for sample in formatted.card["samples"])


def test_the_card_tells_what_the_conversations_are_like(tmp_path):
    rows = [
        (
            "train",
            {"messages": [system("s"), user("What now?"), reply("This."), user("And"), reply("That.")], "topic": "a"},
        ),
        ("train", {"messages": [user("what else"), reply("{}")], "topic": "b", "ok": True}),
        ("train", {"messages": [user("Why"), reply("Because of it")], "topic": "a", "ok": False, "id": 1}),
        ("train", {"messages": [user("Who"), reply("We")], "topic": "b", "ok": False, "id": 2}),
        ("heldout", {"messages": [user("Where"), reply("Here")], "topic": "a", "ok": True, "score": 0.5}),
    ]
    card = run(tmp_path, rows).card
    assert card["roles"] == {"system": 1, "user": 5, "assistant": 5}
    assert card["turns"] == {"1": 3, "2": 1}
    assert card["first_words"]["prompt"] == [["what", 2], ["who", 1], ["why", 1]]
    assert card["first_words"]["reply"][0] == ["because", 1]
    assert card["characters"]["prompt"]["max"] == len("s" + "What now?" + "And")
    assert card["characters"]["reply"]["count"] == 4
    assert card["columns"] == {"topic": [["a", 3], ["b", 2]], "ok": [[False, 2], [True, 2]]}


def test_columns_that_utf8_cannot_hold_are_not_shown(tmp_path):
    odd = [{"topic": "a\ud800"}, {"topic": "b"}, {"x\ud800": "a"}, {"x\ud800": "b"}, {"n": 10**400}, {"n": 1}] * 2
    rows = [qa(f"q {n}", **more) for n, more in enumerate(odd)]
    assert run(tmp_path, rows, {"size": 1, "group_by": "n"}).card["columns"] == {}


def test_plain_texts_have_no_prompt_and_no_turns(tmp_path):
    card = run(tmp_path, [{"text": f"text {n}"} for n in range(5)], {"size": 1}).card
    assert card["turns"] == card["roles"] == {} and card["characters"]["prompt"] == {"count": 0}
    assert card["characters"]["reply"]["count"] == 4 and card["first_words"]["prompt"] == []


def test_several_workers_give_the_same_bytes(tmp_path, monkeypatch):
    """Blocks, not workers, decide what is read and written together."""
    story = " ".join(f"word{n}" for n in range(60))
    rows = [qa(f"{q} {story if n % 3 else n} {n}", f"answer {n % 9}") for n, q in enumerate(QUESTIONS * 5)]
    rows += [qa("x", "")] * 3
    monkeypatch.setattr(block_converter, "BLOCK", 4_000)
    how = {"near_duplicates": "drop", "overlap": "drop"}
    one = run(tmp_path / "one", rows, {"share": 0.1}, **how)
    monkeypatch.setattr(parallel, "worker_count", lambda items, enough, threads: 2)
    two = run(tmp_path / "two", rows, {"share": 0.1}, **how)
    assert one.card["near_duplicates"] and one.card["rejected"] == 3
    for name in FILES:
        assert digest_file(one.out / name) == digest_file(two.out / name), name


def test_row_groups_are_of_a_size_to_share_out(tmp_path, monkeypatch):
    monkeypatch.setattr(block_converter, "BLOCK", 2_000)
    monkeypatch.setattr(format, "GROUP_ROWS", 100)
    formatted = run(tmp_path, [qa(q) for q in QUESTIONS], {"size": 3})
    groups = pq.ParquetFile(formatted.out / "train.parquet").metadata
    sizes = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
    assert max(sizes) <= 100 and sum(sizes) == 397
    assert formatted.ids("train") == sorted(formatted.ids("train"), key=lambda identity: int(identity.split(":")[1]))


def test_a_column_of_few_rows_is_found_among_any_number_of_column_sets():
    known = block_converter.Survey(
        Counter(), {"s": Counter({(f"c{n}",): 1 for n in range(block_converter.MOST_COLUMN_SETS)})}
    )
    known.add(block_converter.Survey(Counter(), {"s": Counter({("c1", "c2"): 5, ("c1", "rare"): 1})}))
    assert ("c1", "rare") in known.column_sets["s"] and ("c1", "c2") not in known.column_sets["s"]


PEAK = """
import json, resource, sys
from pathlib import Path
from adder.formatting import run as format
from adder.core.progress import Progress
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
format.run(settings, {"data": folder / "data"}, folder / "format", Progress.silent())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_stays_flat_however_many_rows(tmp_path):
    peaks = {}
    for count in (20_000, 120_000):
        folder = tmp_path / str(count)
        (folder / "data").mkdir(parents=True)
        (folder / "format").mkdir()
        with (folder / "data/rows.jsonl").open("w") as file:
            for n in range(count):
                row = qa(f"What is {n} plus {n % 7}?", "That is " + "a fairly long answer " * 20 + str(n))
                file.write(json.dumps({"source": "s", "row": n, "split": None, "data": row}) + "\n")
        write_json(folder / "data/reading.json", {"s": {}})
        own = {**PLAIN, "heldout": {"share": 0.01, "size": None}}
        command = [sys.executable, "-c", PEAK, str(folder), json.dumps(own)]
        done = subprocess.run(command, env={**os.environ, "ADDER_THREADS": "1"}, capture_output=True, check=True)
        peaks[count] = int(done.stdout)
    assert (peaks[120_000] - peaks[20_000]) / 100_000 < 250  # bytes a row, of 500 in the file


# Real data


def source(**given):
    return Source(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def run_from_files(tmp_path, sources, heldout, tests=(), **changes):
    data = tmp_path / "data"
    data.mkdir()
    given = RowSettings(sources=sources, heldout_sources=heldout, tests=list(tests))
    fetch_rows.run(given, NoInputs(), data, Context(Progress.silent()))
    out = tmp_path / "format"
    out.mkdir()
    own = {**PLAIN, "heldout": dict.fromkeys(("share", "size", "group_by", "stratify_by")), **changes}
    format.run(own, {"data": data}, out, Progress.silent())
    formatted = Formatted(out)
    assert_all_accounted_for(formatted)
    return data, formatted


def snips(pattern, **changes):
    return source(path=SNIPS / pattern, convert=ROOT / "config/examples/snips.py", **changes)


@needs_shared_data
def test_snips_from_its_raw_files(tmp_path):
    """One pattern for files in two encodings; 11 of the 700 test requests also stand in training."""
    sources = [snips("train_*.json", encoding=["utf-8", "latin-1"])]
    data, formatted = run_from_files(tmp_path, sources, [snips("validate_*.json")])
    splits = Counter(row["split"] for row in read_jsonl(data / "rows.jsonl") if "error" not in row)
    assert splits == {"train": 13_784, "heldout": 700}
    card = formatted.card
    assert card["rejected"] == 0

    def normal(text):
        return " ".join(text.casefold().split())

    asked, repeated, leaked = {"train": Counter(), "heldout": Counter()}, 0, 0
    seen = set()
    for row in reversed(list(read_jsonl(data / "rows.jsonl"))):  # held-out rows first
        prompt, answer = (normal(message["content"]) for message in row["data"]["messages"])
        key = (row["split"], prompt, answer)
        repeated += key in seen
        leaked += row["split"] == "train" and key not in seen and prompt in asked["heldout"]
        seen.add(key)
        asked[row["split"]][prompt] += 1
    assert sum(n for text, n in asked["heldout"].items() if text in asked["train"]) == card["heldout_in_train"] == 11
    assert (card["duplicates"], card["leaked"]) == (repeated, leaked)
    # 170 rows repeat another to the letter, 212 but for case and spacing.
    assert repeated == 212
    assert card["train"] + card["leaked"] + card["heldout"] == 13_784 + 700 - repeated
    trained = {" ".join(prompt.casefold().split()) for prompt in formatted.prompts("train")}
    assert not trained & set(asked["heldout"])


@needs_shared_data
def test_snips_example_and_latin_1(tmp_path):
    with pytest.raises(UserError, match=r"train_PlayMusic_full\.json: byte \d+ .*not valid utf-8.*encoding"):
        run_from_files(tmp_path, [snips("train_*.json")], [snips("validate_*.json")])
    (tmp_path / "again").mkdir()
    _, formatted = run_from_files(
        tmp_path / "again",
        [snips("train_PlayMusic_full.json", encoding="latin-1")],
        [snips("validate_PlayMusic.json")],
    )
    replies = {
        row["messages"][0]["content"]: row["messages"][1]["content"] for row in formatted.train + formatted.heldout
    }
    expected = '{"name": "PlayMusic", "arguments": {"year": "1959", "service": "Iheart"}}'
    assert replies["Play some 1959 songs on Iheart"] == expected
    calls = [json.loads(text) for text in replies.values()]
    values = [value for call in calls for value in call["arguments"].values()]
    assert any(isinstance(value, list) and len(value) == 2 for value in values)
    single = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    assert all(text == text.strip() and text for text in single)
    assert any(char in text for text in replies for char in "éáñö")


@needs_shared_data
def test_gsm8k_needs_no_more_than_its_path(tmp_path):
    train, test = sorted(GSM8K.glob("*train*")), sorted(GSM8K.glob("*test*"))
    _, formatted = run_from_files(tmp_path, [source(path=p) for p in train], [source(path=p) for p in test])
    assert set(formatted.card["row_format"].values()) == {"question_answer"}
    assert formatted.card["rows_in"] == 7_473 + 1_319
    assert formatted.card["rejected"] == 0
    assert "####" in formatted.train[0]["messages"][-1]["content"]


def test_rows_of_the_builtin_generator_are_all_used(tmp_path):
    _, formatted = run_from_files(
        tmp_path, [source(builtin="tickets", rows=60)], [source(builtin="tickets", rows=20, part="heldout")]
    )
    assert formatted.card["rejected"] == formatted.card["leaked"] == 0
    assert formatted.card["heldout"] == 20


def test_writing_then_reading_keeps_odd_text(tmp_path):
    odd = "a\x00b\u2028c\r\nd\U0001f600\ufeff"
    write_jsonl(tmp_path / "x.jsonl", [odd])
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [odd]
    formatted = run(tmp_path / "run", [("train", qa(odd, odd)), ("heldout", qa("b"))])
    assert formatted.train[0]["messages"] == [user(odd), reply(odd)]
