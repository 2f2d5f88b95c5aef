"""Raw rows of every source as JSON lines: which rows are taken, and how each is written.

A row that JSON can't hold is written as unreadable, with its reason, and stays in the count.
"""

import hashlib
import heapq
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from adder.core import row_blocks
from adder.core.kept_blocks import EarlierBlocks
from adder.core.record_blocks import read_range
from adder.core.row_blocks import row_digest
from adder.data import builtin_tickets, documents
from adder.data.readers import json_line, lines_of, read_file
from adder.data.records import ReadableRecord, Split, UnreadableRecord
from adder.data.row_types import MAX_RAW, Row, Unfit, Unreadable
from adder.data.sources import File
from adder.data.stage import Source

NO_NUMBER = "NaN or infinity, which JSON lacks"
MAX_NESTING = 64  # Python's own JSON reader gives up at about a thousand; no conversation needs more than this


def read_source(source: Source, named: list[tuple[str, File]]) -> Iterator[tuple[str, int, Row]]:
    """Yield (file's name, row number from 1, row) for all files of one source, led by their names.

    `limit` keeps the first N rows of the source; `sample` keeps the N rows whose content hashes lowest, in file order,
    so that the same rows are picked wherever they stand. Unreadable rows count as rows in both.
    """
    found = ((name, number, row) for name, file in named for number, row in _rows_of(source, file))
    if source.limit is not None:
        found = itertools.islice(found, source.limit)
    if source.sample is not None:
        ranked = ((_content_hash(item[2]), order, item) for order, item in enumerate(found))
        kept = heapq.nsmallest(source.sample, ranked, key=lambda entry: entry[:2])
        found = (item for _, _, item in sorted(kept, key=lambda entry: entry[1]))
    yield from found


class KeptAs(NamedTuple):
    """The digest of a range's bytes, and of what else its lines of rows.jsonl are made of."""

    key: str
    meaning: str


class EncodedRows(NamedTuple):
    """Lines of rows.jsonl, how many, and how many of them of unreadable rows. kept_as: what a range of a file is known
    by in later runs, None where it isn't kept.
    """

    lines: bytes
    rows: int
    unreadable: int
    kept_as: KeptAs | None = None


def range_encoder(
    path: Path, name: str, split: Split | None, earlier: EarlierBlocks | None = None
) -> Callable[[tuple[int, int, int]], EncodedRows]:
    """The function that reads and encodes one of `readers.line_ranges`, for a file of this short name.

    earlier: what was made of ranges before; one of the same bytes and line numbers is taken from there.
    """

    def encode(lines: tuple[int, int, int]) -> EncodedRows:
        start, end, first = lines
        content = read_range(path, (start, end))
        if earlier is None:
            return read(content, first, None)
        kept_as = KeptAs(row_digest(content).hex(), row_blocks.meaning(earlier.made_by, name, split, first))
        if not earlier.has(*kept_as):
            return read(content, first, kept_as)
        (found,), (rows, unreadable) = earlier.get(*kept_as)
        return EncodedRows(found, rows, unreadable, kept_as)

    def read(content: bytes, first: int, kept_as: KeptAs | None) -> EncodedRows:
        encoded: list[bytes] = []
        unreadable = 0
        for number, line in enumerate(lines_of(io.BytesIO(content)), first):
            row = json_line(line, number)
            if row is not None:
                record, readable = encode_record(name, number, split, row)
                encoded += (record, b"\n")
                unreadable += not readable
        return EncodedRows(b"".join(encoded), len(encoded) // 2, unreadable, kept_as)

    return encode


def encode_record(name: str, number: int, split: Split | None, row: Row) -> tuple[bytes, bool]:
    """One line of rows.jsonl, strict JSON in UTF-8 without the line's end, and whether the row could be read.

    A column that is NaN or infinite, which JSON lacks, becomes null. So does one whose value is of a type that JSON
    can't hold, or that holds NaN somewhere within, and `unfit` names it. A row that JSON or UTF-8 can't hold otherwise
    is written as unreadable.
    """
    if not isinstance(row, Unreadable):
        record: ReadableRecord = {"source": name, "row": number, "split": split, "data": row}
        try:
            try:
                line = orjson.dumps(record, default=_jsonable)
                if b"null" in line and any(map(_holds_no_number, row.values())):
                    raise TypeError
            except TypeError:
                record = _without_unfit(record)
                line = orjson.dumps(record, default=_jsonable)
            # Brackets within text count too, so this asks often enough.
            if line.count(b"{") + line.count(b"[") <= MAX_NESTING:
                return line, True
        except TypeError:  # also for text with half a surrogate pair, numbers of more than 64 bits, keys not text
            pass
        line_or_reason = _encode_with_care(record)
        if isinstance(line_or_reason, bytes):
            return line_or_reason, True
        row = Unreadable(line_or_reason, kind="beyond JSON")
    unreadable: UnreadableRecord = {
        "source": name,
        "row": number,
        "split": split,
        "error": _writable(row.reason),
        "raw": _writable(row.raw[:MAX_RAW]),
        "kind": row.kind,
    }
    return orjson.dumps(unreadable), False


def _rows_of(source: Source, file: File) -> Iterator[tuple[int, Row]]:
    if file.documents:
        return documents.rows(file.documents, lambda path, encoding: _text(path, encoding, file))
    if file.path is not None:
        return read_file(file.path, file.layout, file.notes)
    return enumerate(builtin_tickets.rows(count=source.rows or 0, part=source.part, seed=source.seed), 1)


def _text(path: Path, encoding: str, file: File) -> Row:
    """The one row of a document."""
    return next(row for _, row in read_file(path, replace(file.layout, encoding=encoding), file.notes))


def _encode_with_care(record: ReadableRecord) -> bytes | str:
    """The line, or the reason why there is none, by Python's own JSON, which says what it can't hold."""
    try:
        record = _without_unfit(record)
        row = json.loads(json.dumps(record["data"], default=_jsonable), parse_constant=lambda _: None)
        if _nested_too_deep(row):
            return f"nested more than {MAX_NESTING} levels deep"
        return json.dumps({**record, "data": row}, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"invalid unicode: half a surrogate pair ({error.object[error.start]!a})"
    except RecursionError:
        return f"nested more than {MAX_NESTING} levels deep"
    except (TypeError, ValueError) as error:
        return f"not representable in JSON: {error}"


def _nested_too_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    deepest = 0
    while level and deepest <= MAX_NESTING:
        deepest += 1
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return deepest > MAX_NESTING


def _content_hash(row: Row) -> bytes:
    if isinstance(row, Unreadable):
        content = row.raw.encode("utf-8", "backslashreplace")
    else:
        try:
            content = orjson.dumps(row, default=repr, option=orjson.OPT_SORT_KEYS)
        except TypeError:
            try:
                content = repr(row).encode("utf-8", "backslashreplace")
            except RecursionError:  # becomes an unreadable row when it is written
                content = b""
    return hashlib.blake2b(content, digest_size=16).digest()


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _without_unfit(record: ReadableRecord) -> ReadableRecord:
    """The record with null for each column that holds a value of a type that JSON can't hold, which `unfit` names."""
    data, unfit = dict(record["data"]), dict(record.get("unfit", {}))
    for column, value in data.items():
        try:
            json.dumps(value, default=_jsonable, skipkeys=True)
            if _holds_no_number(value):
                unfit[column], data[column] = NO_NUMBER, None
        except _UnfitError as error:
            unfit[column], data[column] = str(error), None
        except (TypeError, ValueError, RecursionError):  # what makes the whole row unreadable
            pass
    return {**record, "data": data, "unfit": unfit} if unfit else record


def _holds_no_number(value: Any) -> bool:
    """Whether a list or an object holds NaN or an infinity, which within a message or a call would become null."""
    if not isinstance(value, dict | list):
        return False
    waiting: list[Any] = [value]
    while waiting:
        inner = waiting.pop()
        for child in inner.values() if isinstance(inner, dict) else inner:
            if isinstance(child, dict | list):
                waiting.append(child)
            elif isinstance(child, float) and not math.isfinite(child):
                return True
    return False


class _UnfitError(TypeError):
    """A value of a type that JSON can't hold; its message is the type."""


def _jsonable(value: Any) -> Any:
    """Dates, times and decimals, as Parquet and databases have them, as text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, Unfit):
        raise _UnfitError(value.type)
    raise _UnfitError("binary" if isinstance(value, bytes | bytearray | memoryview) else type(value).__name__)
