"""The stage "format": every row in exactly one class, every refusal with its reason, the same bytes every time."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adder.core import parallel
from adder.core.errors import UserError
from adder.core.files import digest_file, read_jsonl, write_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
from adder.data import fetch_rows
from adder.data.stage import RowSettings, Source
from adder.formatting import block_converter
from adder.formatting.run import FormatInputs, run
from format_stage import (
    FILES,
    QUESTIONS,
    Formatted,
    assert_all_accounted_for,
    format_rows,
    format_settings,
    qa,
    reply,
    system,
    user,
    write_reading,
)

ROOT = Path(__file__).resolve().parents[3]
SNIPS = ROOT.parent / "shared" / "data" / "snips"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
needs_shared_data = pytest.mark.skipif(not SNIPS.exists(), reason="../shared/data is not here")


def test_system_prompt_is_added_only_where_there_is_none(tmp_path):
    rows = [{"messages": [system("own"), user("a"), reply("b")]}, {"messages": [user("c"), reply("d")]}]
    formatted = format_rows(tmp_path, rows, {"size": 1}, system_prompt="general")
    systems = {row["messages"][1]["content"]: row["messages"][0] for row in formatted.train + formatted.heldout}
    assert systems == {"a": system("own"), "c": system("general")}


def test_unreadable_rows_are_counted_by_the_kind_of_their_reason(tmp_path):
    def record(row: int, kind: str, error: str) -> dict:
        return {"source": "rows", "row": row, "split": None, "error": error, "raw": "", "kind": kind}

    broken = [record(row, "broken JSON", f"broken JSON at line {row}") for row in (5, 6, 7)]
    formatted = format_rows(tmp_path, [*map(qa, "abc"), record(4, "not an object", "a list"), *broken], {"size": 1})
    assert formatted.card["rejects_by_reason"] == {
        "unreadable row: broken JSON": 3,
        "unreadable row: not an object": 1,
    }
    assert [row["reason"] for row in formatted.rejects][:2] == [
        "unreadable row: a list",
        "unreadable row: broken JSON at line 5",
    ]


def test_a_column_that_could_not_be_read_matters_only_where_it_is_needed(tmp_path):
    def record(row: int, unfit: str) -> dict:
        data = {**qa(f"q{row}"), "took": 1, "image": None, unfit: None}
        return {"source": "rows", "row": row, "split": None, "data": data, "unfit": {unfit: "binary"}}

    rows = [*map(qa, "abcd"), record(5, "took"), record(6, "answer"), record(7, "image")]
    formatted = format_rows(tmp_path, rows, {"size": 1})
    assert [row["row"] for row in formatted.rejects] == [6, 7]
    assert formatted.rejects[0]["reason"] == "the column 'answer' can't be read: its values are of the type binary"
    grouped = format_rows(tmp_path / "grouped", rows[:-2], {"size": 1, "group_by": "took"})
    assert [row["row"] for row in grouped.rejects] == [5]


def test_rejects_name_row_reason_and_data(tmp_path):
    unreadable = {"source": "b", "row": 17, "split": None, "error": "broken JSON at line 17", "raw": '{"a'}
    rows = [qa("1"), qa("2"), {"prompt": "p", "completion": "c"}, qa("3", ""), qa("\ud800"), unreadable]
    formatted = format_rows(tmp_path, rows, {"size": 1})
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
        format_rows(tmp_path / "few", rows, {"size": 1}, max_rejected=0.1)
    assert format_rows(tmp_path / "enough", rows, {"size": 1}, max_rejected=0.2).card["rejected"] == 2


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
    formatted = format_rows(tmp_path, rows, reading=reading)
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
    formatted = format_rows(tmp_path, [*(("train", row) for row in rows), heldout])
    assert [row["row"] for row in formatted.rejects] == [1, 2, 4]
    assert formatted.train[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 2**63}


def test_a_split_column_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="group_by names the column 'autor', which no row has.*answer, author, question"
    ):
        format_rows(tmp_path, [qa("a", author="x")], {"size": 1, "group_by": "autor"})


def test_empty_sets_are_refused_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no row can be used(.|\n)*2 rows: unknown row format: columns x"):
        format_rows(tmp_path / "none", [{"x": "a"}, {"x": "b"}], {"size": 1})
    with pytest.raises(UserError, match="the sources have no rows"):
        format_rows(tmp_path / "nothing", [], {"size": 1})
    with pytest.raises(UserError, match=r"no row is held out: 1 to train on(.|\n)*content is empty: answer"):
        format_rows(tmp_path / "heldout", [("train", qa("a")), ("heldout", qa("b", ""))])
    with pytest.raises(UserError, match="no row is left to train on: 1 held out, 0 duplicates, 1 also held out"):
        format_rows(tmp_path / "train", [("train", qa("a")), ("heldout", qa("A"))])
    with pytest.raises(UserError, match="share 1e-09 of few rows"):
        format_rows(tmp_path / "share", [qa("a"), qa("b")], {"share": 1e-9})


def test_same_rows_give_the_same_bytes(tmp_path):
    rows = [qa(q) for q in QUESTIONS[:50]] + [qa("x", ""), qa(QUESTIONS[0])]
    first, second = (format_rows(tmp_path / name, rows, {"share": 0.2}) for name in ("first", "second"))
    for name in FILES:
        assert digest_file(first.out / name) == digest_file(second.out / name), name


def test_several_workers_give_the_same_bytes(tmp_path, monkeypatch):
    """Blocks, not workers, decide what is read and written together."""
    story = " ".join(f"word{n}" for n in range(60))
    rows = [qa(f"{q} {story if n % 3 else n} {n}", f"answer {n % 9}") for n, q in enumerate(QUESTIONS[:60] * 5)]
    rows += [qa("x", "")] * 3
    monkeypatch.setattr(block_converter, "BLOCK", 4_000)
    how = {"near_duplicates": "drop", "overlap": "drop"}
    one = format_rows(tmp_path / "one", rows, {"share": 0.1}, **how)
    monkeypatch.setattr(parallel, "worker_count", lambda items, enough, threads: 2)
    two = format_rows(tmp_path / "two", rows, {"share": 0.1}, **how)
    assert one.card["near_duplicates"] and one.card["rejected"] == 3
    for name in FILES:
        assert digest_file(one.out / name) == digest_file(two.out / name), name


PEAK = """
import resource, sys
from pathlib import Path
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.formatting.run import FormatInputs, run
from adder.formatting.stage import FormatSettings
folder, settings = Path(sys.argv[1]), FormatSettings.model_validate_json(sys.argv[2])
context = Context(Progress.silent(), Runtime(threads=1))
run(settings, FormatInputs(folder / "data"), folder / "format", context)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in getrusage's unit on Linux")
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
        write_reading(folder / "data", {"s": {}})
        command = [sys.executable, "-c", PEAK, str(folder), format_settings(share=0.01).model_dump_json()]
        done = subprocess.run(command, capture_output=True, check=True)
        peaks[count] = int(done.stdout)
    assert (peaks[120_000] - peaks[20_000]) / 100_000 < 250  # bytes a row, of 500 in the file


def source(**given):
    return Source(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def run_from_files(tmp_path, sources, heldout, tests=(), **changes):
    data = tmp_path / "data"
    data.mkdir()
    given = RowSettings(sources=sources, heldout_sources=heldout, tests=list(tests))
    fetch_rows.run(given, NoInputs(), data, Context(Progress.silent()))
    out = tmp_path / "format"
    out.mkdir()
    run(format_settings(**changes), FormatInputs(data), out, Context(Progress.silent()))
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
    formatted = format_rows(tmp_path / "run", [("train", qa(odd, odd)), ("heldout", qa("b"))])
    assert formatted.train[0]["messages"] == [user(odd), reply(odd)]


def test_sources_without_rows_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    out = tmp_path / "data"
    out.mkdir()
    settings = RowSettings(sources=[Source(path=str(tmp_path / "rows.csv"))])
    fetch_rows.run(settings, NoInputs(), out, Context(Progress.silent()))
    (tmp_path / "format").mkdir()
    with pytest.raises(UserError, match=r"the sources have no rows \(rows\)"):
        run(format_settings(share=0.1), FormatInputs(out), tmp_path / "format", Context(Progress.silent()))
