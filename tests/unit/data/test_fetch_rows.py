"""The stage "data" as a whole: splits, what is said of each file, memory, and no secret in its record."""

import codecs
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import http_server
from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import digest_file
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs, Runtime
from adder.data import fetch_rows, raw_rows
from adder.data.stage import DATA, RowSettings, Source
from adder.workflow import stage_runner
from data_stages import SUM_LINES, write_rows
from earlier_results import context_beside, digests

ROOT = Path(__file__).resolve().parents[3]


def test_builtin_tickets_and_heldout_split(tmp_path):
    tickets = {"builtin": "tickets", "rows": 5, "seed": 1}
    _, records, entries, *_ = write_rows(
        tmp_path / "data", [{**tickets, "part": "train"}], heldout=[{**tickets, "part": "heldout", "rows": 3}]
    )
    assert [entry["name"] for entry in entries] == ["tickets-train", "tickets-heldout"]
    assert [record["split"] for record in records] == ["train"] * 5 + ["heldout"] * 3
    assert entries[1]["builtin"] == {"builtin": "tickets", "part": "heldout", "rows": 3, "seed": 1}


def test_tests_weights_and_columns_reach_reading_json(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"problem": "x"}\n')
    path = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}
    listed = [{"path": path["a"], "weight": 2.5, "row_format": "question_answer", "columns": {"question": "problem"}}]
    _, records, entries, reading, *_ = write_rows(
        tmp_path / "data", listed, heldout=[{"path": path["b"]}], tests=[{"path": path["c"]}]
    )
    assert [(record["source"], record["split"]) for record in records] == [
        ("a", "train"),
        ("b", "heldout"),
        ("c", "test"),
    ]
    columns = {"question": "problem"}
    assert reading["a"] == {"row_format": "question_answer", "columns": columns, "weight": 2.5, "split": "train"}
    assert reading["c"] == {"row_format": "auto", "columns": {}, "weight": 1.0, "split": "test"}
    assert [entry["split"] for entry in entries] == ["train", "heldout", "test"] and entries[0]["weight"] == 2.5


@pytest.mark.usefixtures("downloads")
def test_no_secret_reaches_record_or_log_of_a_stage(tmp_path, monkeypatch):
    secret = "s3cr3t-" + "x9" * 8
    monkeypatch.setenv("MY_SECRET", secret)
    results = tmp_path / "results"
    with http_server.serving({"/rows.jsonl": SUM_LINES}) as web:
        for name in ("rows", "none"):
            source = {"url": f"{web.url}/{name}.jsonl?token=${{MY_SECRET}}", "token_env": "MY_SECRET"}
            settings = RowSettings.model_validate({"sources": [source]})
            identity = DATA.identity(settings, "data", FileDigests(tmp_path / "digests.json", tmp_path))
            parameters = {"settings": settings.model_dump(mode="json"), "identity": identity}
            where = {"inputs": {}, "results": results, "key": name, "log": results / f"{name}.log"}
            expected = contextlib.nullcontext() if name == "rows" else pytest.raises(SystemExit)
            with expected:
                stage_runner.execute("data", parameters, **where)
        assert secret in web.asked[0][0] and secret in web.asked[1][1]["Authorization"]
    record = (results / "stages/data/rows/stage.json").read_text()
    assert "${MY_SECRET}" in record and "HTTP 404" in (results / "none.log").read_text()
    written = [path for path in results.rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(secret.encode() in path.read_bytes() for path in written)


TO_TEXT = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": lambda rows: json.dumps({"data": rows}),
    "csv": lambda rows: "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows),
}


MEASURED = r"""
import re, sys
from pathlib import Path
from adder.data import fetch_rows
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
from adder.data.stage import RowSettings, Source
settings = RowSettings(sources=[Source(path=sys.argv[1])])
fetch_rows.run(settings, NoInputs(), Path(sys.argv[2]), Context(Progress.silent()))
# Not getrusage: its peak begins with the process that started this one.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("ending", "few", "many"), [("jsonl", 50_000, 400_000), ("json", 20_000, 100_000), ("csv", 20_000, 100_000)]
)
def test_memory_does_not_grow_with_the_file(tmp_path, ending, few, many):
    peaks = {}
    for count in (few, many):
        made = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(count)]
        path = tmp_path / f"rows{count}.{ending}"
        path.write_text(TO_TEXT[ending](made))
        del made
        out = tmp_path / f"out{count}"
        out.mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path), str(out)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout)
        assert sum(1 for _ in (out / "rows.jsonl").open("rb")) == count
    assert peaks[many] - peaks[few] < 30, f"megabytes by rows: {peaks}"


def test_templates_and_names_of_messages_reach_reading_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "1", "r": "2"}\n')
    own = {
        "prompt": "{q}?",
        "completion": "{r}",
        "system": "s",
        "message_keys": {"role": "who"},
        "roles": {"user": "A"},
        "values": {"r": {2: "two"}},
    }
    reading = write_rows(tmp_path / "data", [{"path": str(tmp_path / "a.jsonl"), **own}]).reading
    assert reading["a"] == {
        **{"row_format": "auto", "columns": {}, "weight": 1.0, "split": None}, **own, "roles": {"a": "user"},
        "values": {"r": {"2": "two"}},
    }  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_file_read_in_ranges_gives_the_bytes_of_one_read_from_its_beginning(tmp_path, monkeypatch, threads):
    rows = [json.dumps({"q": f"What is {number}?", "n": number}) for number in range(900)]
    rows[5:5] = [
        "",
        "  ",
        "[1]",
        "{broken",
        '{"q": "half a pair \\ud800"}',
        '{"big": 12345678901234567890123}',
        "NaN",
        '{"a":',
    ]
    rows[500] += "\r\n" + rows[501] + "\r" + rows[502]
    path = tmp_path / "rows.jsonl"
    context = Context(Progress.silent(), Runtime(threads=threads))

    def fetched(size: int) -> dict[str, bytes]:
        monkeypatch.setattr(fetch_rows, "RANGE", size)
        out = tmp_path / f"{size}-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        fetch_rows.run(RowSettings(sources=[Source(path=str(path))]), NoInputs(), out, context)
        return {file.name: file.read_bytes() for file in out.iterdir()}

    for start in (b"", codecs.BOM_UTF8, b"\n", b"\r\n"):
        for end in (b"\n", b"", b"\r\n\r\n"):
            path.write_bytes(start + "\n".join(rows).encode() + end)
            whole = fetched(1 << 30)
            assert whole["rows.jsonl"].count(b"\n") > 900
            assert fetched(700) == fetched(3000) == whole
    path.write_bytes("\n".join(rows).encode() + b"\n\xff\n")
    with pytest.raises(UserError) as from_beginning:
        fetched(1 << 30)
    with pytest.raises(UserError) as in_ranges:
        fetched(700)
    assert str(in_ranges.value) == str(from_beginning.value)


READS_MORE = """
import csv, subprocess
from pathlib import Path

def rows(path, encoding):
    labels = dict(csv.reader(open(Path(__file__).with_name("labels.csv"))))
    Path(__file__).with_name("cache.json").write_text("{}")
    Path(__file__).with_name("cache.json").read_text()
    try:
        open(Path(__file__).with_name("more.csv"))
    except FileNotFoundError:
        pass
    subprocess.run(["true"])
    for line in open(path):
        yield {"prompt": line, "completion": labels[line.strip()]}
"""


def test_what_a_converter_opens_beside_its_source_is_said_and_kept_with_its_digest(tmp_path):
    """Not what it writes itself, nor the libraries that it imports."""
    (tmp_path / "mine.py").write_text(READS_MORE)
    (tmp_path / "rows.dat").write_text("a\nb\n")
    (tmp_path / "labels.csv").write_text("a,1\nb,2\n")
    own = {"path": str(tmp_path / "rows.dat"), "convert": str(tmp_path / "mine.py")}
    summary, records, *_, shown = write_rows(tmp_path / "data", [own])
    assert [record["data"]["completion"] for record in records] == ["1", "2"]
    assert summary["also_read"] == {
        str(tmp_path / "labels.csv"): digest_file(tmp_path / "labels.csv"),
        str(tmp_path / "more.csv"): "absent",
    }
    assert f"{tmp_path}/mine.py also reads 2 files that the settings don't name: {tmp_path}/labels.csv" in shown
    assert f"{tmp_path}/mine.py asks other programs: nothing tells when these answer otherwise" in shown


def test_what_a_converter_opens_may_not_change_meanwhile(tmp_path):
    (tmp_path / "mine.py").write_text(READS_MORE + "    open(Path(__file__).with_name('labels.csv'), 'a').write('c,3')")
    (tmp_path / "rows.dat").write_text("a\n")
    (tmp_path / "labels.csv").write_text("a,1\n")
    own = {"path": str(tmp_path / "rows.dat"), "convert": str(tmp_path / "mine.py")}
    with pytest.raises(UserError, match=r"labels.csv: changed while being read; start the workflow again"):
        write_rows(tmp_path / "data", [own])


def test_files_that_are_read_twice_and_those_for_tests_are_named(tmp_path):
    for name in ("train", "my-test.v2", "contest"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    listed = [{"path": f"{tmp_path}/*.jsonl"}, {"path": f"{tmp_path}/train.jsonl"}]
    _, _, entries, *_ = write_rows(tmp_path / "data", listed)
    notes = {f"{Path(entry['path']).name} {number}": entry.get("notes", []) for number, entry in enumerate(entries)}
    assert [name for name, found in notes.items() if "its name says that it is for tests" in str(found)] == [
        "my-test.v2.jsonl 1"
    ]
    assert [name for name, found in notes.items() if "the same file is read" in str(found)] == ["train.jsonl 3"]
    _, _, entries, *_ = write_rows(tmp_path / "alone", [{"path": f"{tmp_path}/my-test.v2.jsonl"}])
    assert "notes" not in entries[0]


def test_ranges_of_a_large_file_that_an_earlier_run_read_are_taken_from_it(tmp_path, monkeypatch):
    """Appended, changed and removed rows: the bytes are those of a run from nothing."""
    monkeypatch.setattr(fetch_rows, "RANGE", 4000)
    lines = [json.dumps({"question": f"What is {n}?", "answer": f"{n}"}) for n in range(1000)]
    lines[500] = "{broken"
    rows, small = tmp_path / "rows.jsonl", tmp_path / "small.jsonl"
    small.write_text('{"question": "q", "answer": "a"}\n')
    settings = RowSettings(sources=[Source(path=str(small)), Source(path=str(rows))])
    read: list[int] = []
    json_line = raw_rows.json_line

    def run(out, *earlier):
        read.clear()
        out.mkdir()
        fetch_rows.run(settings, NoInputs(), out, context_beside(*earlier))
        return digests(out)

    monkeypatch.setattr(raw_rows, "json_line", lambda line, number: read.append(number) or json_line(line, number))
    changes = {
        "first": lines,
        "appended": [*lines, lines[0].replace("What", "Where")],
        "changed": [*lines[:700], lines[700].replace("What", "When"), *lines[701:]],
        "removed": lines[1:],
    }
    for name, changed in changes.items():
        rows.write_text("\n".join(changed) + "\n")
        beside = run(tmp_path / name, *([] if name == "first" else [tmp_path / "first"]))
        taken = len(read)
        assert run(tmp_path / f"{name} from nothing") == beside
        assert len(read) == len(changed)
        assert taken == len(changed) if name in ("first", "removed") else 0 < taken < 200
    rows.write_text("\n".join(lines) + "\n")
    settings = RowSettings(sources=[Source(path=str(rows))])
    run(tmp_path / "alone", tmp_path / "first")
    assert not read  # what stands before it doesn't matter
