"""The stage "data": the raw rows of every source as JSON lines."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adder.core import opened_files, parallel
from adder.core.files import write_json
from adder.core.kept_blocks import BlockIndex, EarlierBlocks
from adder.core.stage_spec import Context, NoInputs
from adder.data import raw_rows, readers, sources
from adder.data.compression import bare_name
from adder.data.converter import imported_files
from adder.data.records import Reading, RowSummary, SourceRecord, Split
from adder.data.stage import RowSettings, Source

ROWS, RANGES = "rows.jsonl", "ranges.json"
PROGRESS_EVERY = 10_000  # rows
RANGE = 1 << 20  # bytes of a file that a process reads at once
READERS = 4  # processes at most: writing is for one
FOR_TESTS = {"test", "valid", "validation", "val", "dev", "eval", "heldout", "holdout"}  # in names of files
WRITE_BUFFER = 1 << 20  # bytes


def run(settings: RowSettings, inputs: NoInputs, out: Path, context: Context) -> RowSummary:
    """Write every source's rows to `out/rows.jsonl` (a RowRecord a line), one SourceRecord a file to
    `out/sources.json`, and to `out/reading.json` the Reading of each file by its name. `out/ranges.json` tells later
    runs which lines of rows.jsonl are of which bytes of a large file of JSON lines.

    Raises UserError for a source that can't be found, fetched, trusted or read.
    """
    heldout = settings.heldout_sources or []
    groups: list[tuple[Split | None, str, list[Source]]] = [
        ("train" if heldout else None, "data.sources", settings.sources),
        ("heldout", "data.heldout.sources", heldout),
        ("test", "data.tests", settings.tests),
    ]
    fetched: list[tuple[Split | None, Source, list[sources.File]]] = [
        (split, source, sources.fetch(source, f"{where}.{number}", context.progress))
        for split, where, listed in groups
        for number, source in enumerate(listed)
    ]
    _note_files(fetched)
    names = iter(sources.short_names([file for _, _, files in fetched for file in files]))
    records: list[SourceRecord] = []
    readings: dict[str, Reading] = {}
    also_read: dict[str, str] = {}
    earlier, index = None, None
    if context.earlier:
        earlier = EarlierBlocks(context.earlier, raw_rows.__name__, "orjson", payload=ROWS, index=RANGES)
        index = BlockIndex(earlier.made_by)
    with (out / ROWS).open("wb", buffering=WRITE_BUFFER) as lines:
        for split, source, files in fetched:
            named = [(next(names), file) for file in files]
            with _noting_what_is_opened(source, files, also_read, context):
                records += _write_source(lines, split, source, named, earlier, index, context)
            readings |= {name: reading_of(source, split) for name, _ in named}
    if index:
        index.write(out / RANGES)
    write_json(out / "sources.json", records)
    write_json(out / "reading.json", readings)
    summary: RowSummary = {
        "rows": sum(record["rows"] for record in records),
        "unreadable": sum(record["unreadable"] for record in records),
        "sources": len(records),
    }
    if also_read:
        summary["also_read"] = also_read
    context.progress.say(
        f"{summary['rows']:,} rows from {summary['sources']} sources, {summary['unreadable']:,} unreadable"
    )
    return summary


def _noting_what_is_opened(
    source: Source, files: list[sources.File], also_read: dict[str, str], context: Context
) -> contextlib.AbstractContextManager[None]:
    """Have what a source's converter opens beside the source's files and its own code in `also_read`."""
    if source.convert is None:
        return contextlib.nullcontext()
    converter = Path(source.convert).expanduser().absolute()
    known = [*(file.path for file in files if file.path), converter, *imported_files(converter)]
    return opened_files.noted(source.convert, known, also_read, context)


def _note_files(fetched: list[tuple[Split | None, Source, list[sources.File]]]) -> None:
    """Note of files that are read more than once, and of those among others whose names say that they are for tests."""
    seen: set[tuple[Path, str | None, str | None]] = set()
    for split, _, files in fetched:
        for file in files:
            if file.path is None:
                continue
            place = (file.path.resolve(), file.layout.table, file.layout.split)
            if place in seen:
                file.notes["the same file is read for another source, or twice for this one"] = 1
            seen.add(place)
            words = set(re.split(r"[^a-z]+", bare_name(file.path).lower()))
            if split in (None, "train") and len(files) > 1 and not words.isdisjoint(FOR_TESTS):
                file.notes[
                    "its name says that it is for tests, and it is read as one to train on: name the others by a "
                    "pattern that leaves it out, and this one in data.heldout.sources or data.tests"
                ] = 1


def _write_source(
    lines: BinaryIO,
    split: Split | None,
    source: Source,
    named: list[tuple[str, sources.File]],
    earlier: EarlierBlocks | None,
    index: BlockIndex | None,
    context: Context,
) -> list[SourceRecord]:
    """Append one source's rows to the open rows.jsonl; return each file's entry of sources.json."""
    progress = context.progress
    rows_of: Counter[str] = Counter()
    unreadable_of: Counter[str] = Counter()
    for name, encoded in _encoded(split, source, named, earlier, context.threads):
        lines.write(encoded.lines)
        if index and encoded.kept_as:
            index.add(*encoded.kept_as, [len(encoded.lines)], [encoded.rows, encoded.unreadable])
        elif index:
            index.skip(len(encoded.lines))
        rows_of[name] += encoded.rows
        unreadable_of[name] += encoded.unreadable
        if encoded.rows > 1 or rows_of[name] % PROGRESS_EVERY == 0:
            progress.line(f"{name}: {rows_of[name]:,} rows")
    described = [
        sources.describe(source, file, name, split, rows_of[name], unreadable_of[name]) for name, file in named
    ]
    for record in described:
        for note in record.get("notes", []):
            progress.note(f"{record['name']}: {note}")
    return described


def _encoded(
    split: Split | None,
    source: Source,
    named: list[tuple[str, sources.File]],
    earlier: EarlierBlocks | None,
    threads: int,
) -> Iterator[tuple[str, raw_rows.EncodedRows]]:
    """The rows of one source as lines of rows.jsonl, some at a time, led by their file's name."""
    whole = source.limit is None and source.sample is None and source.path is not None
    for name, file in named:
        ranges = (
            readers.line_ranges(file.path, file.layout, RANGE) if whole and file.path and not file.documents else None
        )
        if file.path is None or ranges is None:
            break
        make = partial(raw_rows.range_encoder, file.path, name, split, earlier)
        try:
            for encoded in parallel.map_batches(make, ranges, parallel.worker_count(READERS, 1, threads)):
                yield name, encoded
        except UnicodeDecodeError:
            raise readers.not_utf8(file.path) from None
        named = named[1:]
    for name, number, row in raw_rows.read_source(source, named):
        line, readable = raw_rows.encode_record(name, number, split, row)
        yield name, raw_rows.EncodedRows(line + b"\n", 1, int(not readable))


def reading_of(source: Source, split: Split | None) -> Reading:
    """How the rows of a source are to be read."""
    reading: Reading = {
        "row_format": source.row_format,
        "columns": source.columns,
        "weight": source.weight,
        "split": split,
    }
    if source.system is not None:
        reading["system"] = source.system
    if source.prompt is not None:
        reading["prompt"] = source.prompt
    if source.completion is not None:
        reading["completion"] = source.completion
    if source.message_keys:
        reading["message_keys"] = {ours: theirs for ours, theirs in source.message_keys.items()}
    if source.roles:
        reading["roles"] = source.roles_by_name()
    if source.values:
        reading["values"] = source.values_by_name()
    return reading
