"""Rows to conversations: formats, reasons for rejection, duplicates, leaks, and a split that stays put."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adder import download, format
from adder.conversations import Rejected, recognise, recognise_source, to_messages
from adder.errors import UserError
from adder.files import digest_file, read_json, read_jsonl, read_table, write_jsonl
from adder.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
SNIPS = ROOT.parent / "shared" / "data" / "snips"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
needs_shared_data = pytest.mark.skipif(not SNIPS.exists(), reason="../shared/data is not here")


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def qa(question, answer="yes"):
    return {"question": question, "answer": answer}


class Formatted:
    """What one run of the stage wrote."""

    def __init__(self, out: Path):
        self.out = out
        self.card = read_json(out / "card.json")
        self.train = read_table(out / "train.parquet").to_pylist()
        self.heldout = read_table(out / "heldout.parquet").to_pylist()
        self.rejects, self.duplicates, self.leaked = (
            list(read_jsonl(out / f"{name}.jsonl")) for name in ("rejects", "duplicates", "leaked")
        )

    def prompts(self, split):
        return {row["messages"][-2]["content"] for row in getattr(self, split)}


def run(tmp_path, records, share=None, size=None, system_prompt=None, drop_duplicates=True) -> Formatted:
    """Run the stage over records: rows as dictionaries, or (split, row), or whole records."""
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
    own = {
        "system_prompt": system_prompt,
        "drop_duplicates": drop_duplicates,
        "heldout": {"share": share, "size": size},
    }
    summary = format.run(own, {"data": data}, out, Progress.silent())
    formatted = Formatted(out)
    assert summary == {name: formatted.card[name] for name in format.COUNTS}
    assert_all_accounted_for(formatted.card)
    return formatted


def assert_all_accounted_for(card):
    for counts in [card, *card["by_source"].values()]:
        kept = counts["train"] + counts["heldout"]
        assert counts["rows_in"] == kept + counts["duplicates"] + counts["leaked"] + counts["rejected"]
    assert card["accepted"] == card["train"] + card["heldout"]
    assert card["rejected"] == sum(card["rejects_by_reason"].values())


# Row formats


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": [system("s"), user("q"), reply("a")]}, [system("s"), user("q"), reply("a")]),
        (
            "messages",
            {"messages": [user("q"), {**reply("a"), "tool_calls": None, "weight": 1, "train": True}]},
            [user("q"), reply("a")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [system("s"), user("q"), reply("a")],
        ),
        ("sharegpt", {"conversations": [user("q"), reply("a")]}, [user("q"), reply("a")]),
        ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, [user("Add.\n\n1 1"), reply("2")]),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "2"}, [user("Add."), reply("2")]),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            [system("s"), user("a"), reply("b"), user("c"), reply("d")],
        ),
        ("prompt_completion", {"prompt": "q", "completion": " a\n"}, [user("q"), reply(" a\n")]),
        ("prompt_completion", {"prompt": [user("q")], "completion": [reply("a")]}, [user("q"), reply("a")]),
        ("question_answer", {"question": "q", "answer": "a", "id": 7}, [user("q"), reply("a")]),
    ],
)
def test_row_formats(name, row, messages):
    assert recognise(row) == name
    assert to_messages(row, name) == messages


def test_a_source_is_what_most_of_its_rows_are():
    votes = Counter({("answer", "question"): 3, ("completion", "prompt"): 2, ("x",): 90})
    assert recognise_source(votes) == "question_answer"
    assert recognise_source(Counter({("x",): 1})) is None


def test_system_prompt_is_added_only_where_there_is_none(tmp_path):
    rows = [{"messages": [system("own"), user("a"), reply("b")]}, {"messages": [user("c"), reply("d")]}]
    formatted = run(tmp_path, rows, size=1, system_prompt="general")
    systems = {row["messages"][1]["content"]: row["messages"][0] for row in formatted.train + formatted.heldout}
    assert systems == {"a": system("own"), "c": system("general")}


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ({"messages": []}, "messages is empty", ""),
        ({"messages": "hello"}, "messages is not a list", "text"),
        ({"messages": [user("q"), "a"]}, "a message is not an object", "message 2"),
        ({"messages": [user("q")]}, "no assistant turn", "user"),
        ({"messages": [system("s")]}, "no assistant turn", "system"),
        ({"messages": [user("q"), reply("a"), user("q")]}, "the last message is not the assistant's", ""),
        ({"messages": [reply("a")]}, "user and assistant do not alternate, user first", "assistant"),
        ({"messages": [user("q"), user("q"), reply("a")]}, "user and assistant do not alternate, user first", ""),
        ({"messages": [user("q"), system("s"), reply("a")]}, "a system message that is not the first", ""),
        ({"messages": [user("q"), {"role": "tool", "content": "3"}, reply("a")]}, "unknown role", "'tool'"),
        ({"messages": [user("q"), {"content": "a"}]}, "unknown role", "nothing"),
        ({"messages": [user("q"), {"role": "assistant", "content": None}]}, "content is not text", "nothing"),
        ({"messages": [user([{"type": "text", "text": "q"}]), reply("a")]}, "content is not text", "typed parts"),
        ({"messages": [user("q"), reply(" \n")]}, "content is empty", "assistant message 2"),
        ({"messages": [user("q\ud800"), reply("a")]}, "invalid unicode", "user message 1"),
        ({"messages": [user("q"), {**reply("a"), "tool_calls": [{}]}]}, "'tool_calls' in a message", "message 2"),
        ({"messages": [user("q"), {**reply("a"), "weight": 0}]}, "weight or train mark", "message 2"),
        ({"messages": [user("q"), {**reply("a"), "train": False}]}, "weight or train mark", "message 2"),
        ({"messages": [user("q"), reply("a")], "tools": [{}]}, "the column 'tools'", ""),
        ({"question": "q", "answer": 4}, "content is not text", "answer is a number"),
        ({"instruction": "i", "output": "o", "history": "h"}, "history is not a list", "text"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "history is not a list", "entry 1"),
        ({"prompt": [user("q")], "completion": "a"}, "content is not text", "prompt is a list"),
        ({"chosen": "a", "rejected": "b"}, "preference data", "chosen"),
        ({"text": "a"}, "unknown row format", "columns text; known are messages"),
        ({}, "unknown row format", "columns none"),
    ],
)
def test_unusable_rows_have_a_reason_to_act_on(row, kind, detail):
    with pytest.raises(Rejected) as caught:
        to_messages(row, recognise(row))
    assert kind in caught.value.kind
    assert detail in str(caught.value)


def test_rejects_name_row_reason_and_data(tmp_path):
    unreadable = {"source": "b", "row": 17, "split": None, "error": "broken JSON at line 17", "raw": '{"a'}
    rows = [qa("1"), qa("2"), {"prompt": "p", "completion": "c"}, qa("3", ""), qa("\ud800"), unreadable]
    formatted = run(tmp_path, rows, size=1)
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


# Duplicates and leaks


def test_only_exact_duplicates_are_dropped_and_the_first_stays(tmp_path):
    formatted = run(tmp_path, [qa("a"), qa("b"), qa("a"), qa("A"), qa("a", "no"), qa("a")], size=1)
    dropped = [(row["row"], row["matches"]) for row in formatted.duplicates]
    assert dropped == [(3, "rows:1"), (6, "rows:1")]


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
    assert formatted.card["heldout_in_train"] == 2


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
    old = run(tmp_path / "old", [qa(q) for q in QUESTIONS[:200]], share=0.2)
    new = run(tmp_path / "new", [qa(q) for q in reversed(QUESTIONS)], share=0.2)
    assert old.prompts("heldout") == new.prompts("heldout") & set(QUESTIONS[:200])
    assert 20 <= len(old.heldout) <= 60
    assert 50 <= len(new.heldout) <= 110


def test_a_larger_share_only_adds_to_the_held_out_rows(tmp_path):
    small = run(tmp_path / "small", [qa(q) for q in QUESTIONS], share=0.1)
    large = run(tmp_path / "large", [qa(q) for q in QUESTIONS], share=0.3)
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
    before = run(tmp_path / "before", old_rows, size=size)
    after = run(tmp_path / "after", new_rows, size=size)
    texts_before, texts_after = ({json.dumps(row["messages"]) for row in f.heldout} for f in (before, after))
    assert len(texts_before) == len(texts_after) == size
    assert len(texts_before - texts_after) <= 1


def test_a_prompt_never_stands_on_both_sides(tmp_path):
    rows = [qa(q.upper() if n % 2 else q, str(n)) for n, q in enumerate(QUESTIONS[:30] * 4)]
    for name, how in (("share", {"share": 0.3}), ("size", {"size": 37})):
        formatted = run(tmp_path / name, rows, **how)
        heldout, train = ({q.casefold() for q in formatted.prompts(split)} for split in ("heldout", "train"))
        assert not heldout & train
        assert heldout and train
    assert formatted.card["heldout"] == 37


def test_heldout_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.heldout.size is 3, but there are only 3 usable rows"):
        run(tmp_path, [qa("a"), qa("b"), qa("c"), qa("c")], size=3)


def test_no_way_to_hold_out_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs one of share, size and sources"):
        run(tmp_path, [qa("a"), qa("b")])


def test_empty_sets_are_refused_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no row can be used(.|\n)*2 rows: unknown row format: columns text"):
        run(tmp_path / "none", [{"text": "a"}, {"text": "b"}], size=1)
    with pytest.raises(UserError, match="no row can be used"):
        run(tmp_path / "nothing", [], size=1)
    with pytest.raises(UserError, match=r"no row is held out: 1 to train on(.|\n)*content is empty: answer"):
        run(tmp_path / "heldout", [("train", qa("a")), ("heldout", qa("b", ""))])
    with pytest.raises(UserError, match="no row is left to train on: 1 held out, 0 duplicates, 1 also held out"):
        run(tmp_path / "train", [("train", qa("a")), ("heldout", qa("A"))])
    with pytest.raises(UserError, match="share 1e-09 of few rows"):
        run(tmp_path / "share", [qa("a"), qa("b")], share=1e-9)


def test_same_rows_give_the_same_bytes(tmp_path):
    rows = [qa(q) for q in QUESTIONS[:50]] + [qa("x", ""), qa(QUESTIONS[0])]
    first, second = (run(tmp_path / name, rows, share=0.2) for name in ("first", "second"))
    files = sorted(path.name for path in first.out.iterdir())
    assert files == [
        "card.json",
        "duplicates.jsonl",
        "heldout.parquet",
        "leaked.jsonl",
        "rejects.jsonl",
        "train.parquet",
    ]
    for name in files:
        assert digest_file(first.out / name) == digest_file(second.out / name), name


def test_samples_are_three_training_conversations(tmp_path):
    formatted = run(tmp_path, [qa(q) for q in QUESTIONS[:20]], size=2)
    trained = [row["messages"] for row in formatted.train]
    assert len(formatted.card["samples"]) == 3
    assert all(sample in trained for sample in formatted.card["samples"])


# Broken rows

ROLE = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "", None, 3])
TEXT = st.one_of(
    st.text(st.characters(), max_size=6), st.sampled_from(["a", "", " ", "\ud800", "\x00", None, 3, [], {}])
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({}, optional={"role": ROLE, "content": TEXT, "from": ROLE, "value": TEXT, "weight": TEXT}),
    TEXT,
)
COLUMN = st.one_of(TEXT, st.lists(MESSAGE, max_size=4), st.lists(st.lists(TEXT, max_size=3), max_size=2))
NAMES = [
    *("messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input", "output"),
    *("history", "system", "tools", "chosen", "rejected", "text"),
]
BROKEN = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), COLUMN, max_size=5),
    st.lists(MESSAGE, max_size=5).map(lambda messages: {"messages": messages}),
    st.builds(qa, TEXT, TEXT),
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["train", "heldout"]), BROKEN), max_size=12),
    column=st.sampled_from(["messages", "question"]),
    duplicates=st.booleans(),
)
def test_random_broken_rows_never_crash_and_never_vanish(tmp_path_factory, rows, column, duplicates):
    good = {
        "messages": lambda text: {"messages": [user(text), reply("a")]},
        "question": qa,
    }[column]
    whole = [(split, good(f"{split} {n}")) for split in ("train", "heldout") for n in range(len(rows) + 1)]
    records = [
        {"source": "broken" if n % 3 else "mixed", "row": n, "split": split, "data": row}
        for n, (split, row) in enumerate(rows + whole, 1)
    ]
    formatted = run(tmp_path_factory.mktemp("fuzz"), records, drop_duplicates=duplicates)
    assert formatted.card["rows_in"] == len(records)
    ids = [row["id"] for row in formatted.train + formatted.heldout]
    ids += [f"{row['source']}:{row['row']}" for row in formatted.rejects + formatted.duplicates + formatted.leaked]
    assert sorted(ids) == sorted(f"{record['source']}:{record['row']}" for record in records)


# Real data


def source(path, **changes):
    defaults = {"format": "auto", "encoding": "utf-8", "convert": None, "limit": None, "sample": None, "license": None}
    return {"path": str(path), **defaults, **changes}


def run_from_files(tmp_path, sources, heldout, **how):
    data = tmp_path / "data"
    data.mkdir()
    download.run_data({"sources": sources, "heldout": {"sources": heldout}}, {}, data, Progress.silent())
    out = tmp_path / "format"
    out.mkdir()
    own = {"system_prompt": None, "drop_duplicates": True, "heldout": {"share": None, "size": None, **how}}
    format.run(own, {"data": data}, out, Progress.silent())
    assert_all_accounted_for(read_json(out / "card.json"))
    return data, Formatted(out)


def snips(pattern, **changes):
    return source(SNIPS / pattern, convert=str(ROOT / "config/examples/snips.py"), **changes)


@needs_shared_data
def test_snips_from_its_raw_files(tmp_path):
    """One source an encoding; 11 of the 700 test requests also stand in training, and 11 training rows go for it."""
    sources = [snips("train_[!P]*.json"), snips("train_PlayMusic_full.json", encoding="latin-1")]
    data, formatted = run_from_files(tmp_path, sources, [snips("validate_*.json")])
    splits = Counter(row["split"] for row in read_jsonl(data / "rows.jsonl") if "error" not in row)
    assert splits == {"train": 13_784, "heldout": 700}
    card = formatted.card
    assert card["rejected"] == 0

    def normal(row):
        return " ".join(row["data"]["messages"][0]["content"].casefold().split())

    rows = list(read_jsonl(data / "rows.jsonl"))
    asked = {split: [normal(row) for row in rows if row["split"] == split] for split in ("train", "heldout")}
    both = set(asked["train"]) & set(asked["heldout"])
    assert sum(text in both for text in asked["heldout"]) == card["heldout_in_train"] == 11
    assert sum(text in both for text in asked["train"]) == card["leaked"] == 11
    # 170 rows repeat another exactly, 3 of them among the 700.
    assert (card["duplicates"], card["heldout"], card["train"]) == (170, 697, 13_784 - 167 - 11)
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
    _, formatted = run_from_files(tmp_path, [source(path) for path in train], [source(path) for path in test])
    assert set(formatted.card["row_format"].values()) == {"question_answer"}
    assert formatted.card["rows_in"] == 7_473 + 1_319
    assert formatted.card["rejected"] == 0
    assert "####" in formatted.train[0]["messages"][-1]["content"]


def test_rows_of_the_builtin_generator_are_all_used(tmp_path):
    tickets = {"builtin": "tickets", "seed": 42}
    _, formatted = run_from_files(
        tmp_path, [{**tickets, "rows": 60, "part": "train"}], [{**tickets, "rows": 20, "part": "heldout"}]
    )
    assert formatted.card["rejected"] == formatted.card["leaked"] == 0
    assert formatted.card["heldout"] == 20


def test_writing_then_reading_keeps_odd_text(tmp_path):
    odd = "a\x00b\u2028c\r\nd\U0001f600\ufeff"
    write_jsonl(tmp_path / "x.jsonl", [odd])
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [odd]
    formatted = run(tmp_path / "run", [("train", qa(odd, odd)), ("heldout", qa("b"))])
    assert formatted.train[0]["messages"] == [user(odd), reply(odd)]
