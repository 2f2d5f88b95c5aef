"""The stage "data": the raw rows of every source as JSON lines."""

from pathlib import Path
from typing import BinaryIO

from adder.core.errors import UserError
from adder.core.files import write_json
from adder.core.progress import Progress
from adder.data import raw_rows, sources

PROGRESS_EVERY = 10_000  # rows
WRITE_BUFFER = 1 << 20  # bytes


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write every source's rows to `out/rows.jsonl`, one entry a file to `out/sources.json`, and to `out/reading.json`
    how each file's rows are to be read.

    settings: sources, heldout.sources, tests (lists of settings.Source). A row is {"source", "row", "split", "data"},
    or {"source", "row", "split", "error", "raw"} where it could not be read. `row` counts from 1: the line in a JSONL
    file, the row elsewhere. `split` is null unless the held-out rows have sources of their own, and "test" for test
    sets that are only to be kept out of training. Returns {"rows", "unreadable", "sources"}.
    """
    heldout = (settings.get("heldout") or {}).get("sources") or []
    if not settings["sources"]:
        raise UserError("data.sources is empty: name at least one file, for example [{path: data/rows.jsonl}]")
    groups = [
        ("train" if heldout else None, "data.sources", settings["sources"]),
        ("heldout", "data.heldout.sources", heldout),
        ("test", "data.tests", settings.get("tests") or []),
    ]
    fetched = [
        (split, source, sources.fetch(source, f"{where}.{number}", progress))
        for split, where, listed in groups
        for number, source in enumerate(listed)
    ]
    names = iter(sources.short_names([file for _, _, files in fetched for file in files]))
    entries = []
    with (out / "rows.jsonl").open("wb", buffering=WRITE_BUFFER) as lines:
        for split, source, files in fetched:
            named = [(next(names), file) for file in files]
            entries += _write_source(lines, split, source, named, progress)
    write_json(out / "sources.json", [entry for entry, _ in entries])
    write_json(out / "reading.json", {entry["name"]: reading for entry, reading in entries})
    summary = {
        "rows": sum(entry["rows"] for entry, _ in entries),
        "unreadable": sum(entry["unreadable"] for entry, _ in entries),
        "sources": len(entries),
    }
    progress.say(f"{summary['rows']:,} rows from {summary['sources']} sources, {summary['unreadable']:,} unreadable")
    return summary


def _write_source(
    lines: BinaryIO, split: str | None, source: dict, named: list[tuple[str, sources.File]], progress: Progress
) -> list[tuple[dict, dict]]:
    """Append one source's rows to the open rows.jsonl; return each file's entries of sources.json and reading.json."""
    rows_of = dict.fromkeys((name for name, _ in named), 0)
    unreadable_of = dict(rows_of)
    for name, number, row in raw_rows.read_source(source, named):
        line, readable = raw_rows.encode_record(name, number, split, row)
        lines.write(line)
        lines.write(b"\n")
        rows_of[name] += 1
        unreadable_of[name] += not readable
        if rows_of[name] % PROGRESS_EVERY == 0:
            progress.line(f"{name}: {rows_of[name]:,} rows")
    reading = {"row_format": source.get("row_format") or "auto", "columns": source.get("columns") or {}}
    reading |= {"weight": source.get("weight", 1.0), "split": split}
    return [
        (
            {"name": name, **sources.describe(source, file), "split": split}
            | {"rows": rows_of[name], "unreadable": unreadable_of[name]},
            reading,
        )
        for name, file in named
    ]
