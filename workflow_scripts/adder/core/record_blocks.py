"""rows.jsonl in blocks of rows, each known by its content: whose rows it holds, where, and under what key."""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from adder.core import row_blocks
from adder.core.errors import UserError
from adder.core.row_blocks import Digests, row_digest

Integers = npt.NDArray[np.int64]
Range = tuple[int, int]  # bytes of a file: whole lines

# How the stage "data" begins a line; what follows doesn't tell where the row stands.
BEGINNING = re.compile(rb'\{"source":"([^"\\]*)","row":(\d+),"split":(null|"[a-z]+"),')
LONG_NUMBER = re.compile(rb"\d{19}")


class RecordBlock(NamedTuple):
    """Rows of one source that follow one another.

    first_row: number of the first; start, end: bytes of rows.jsonl; key: equal for blocks of equal rows, as far as
    these are numbered alike from their first one on.
    """

    source: str
    split: str | None
    first_row: int
    rows: int
    start: int
    end: int
    key: str


class Scanned(NamedTuple):
    """The n rows of some lines: where each line begins, the row's number, the digest of all but that; (n,) each.

    runs: source and split, and how many of the rows that follow one another are of these.
    """

    starts: Integers
    numbers: Integers
    digests: Digests
    runs: list[tuple[str, str | None, int]]


def scanner(path: Path) -> Callable[[Range], Scanned]:
    """The function that scans one range of the file."""
    return partial(_scan, path)


def _scan(path: Path, lines: Range) -> Scanned:
    starts: list[int] = []
    numbers: list[int] = []
    digests: list[bytes] = []
    begun: list[tuple[str, str | None, int]] = []  # and how many rows stand before the run
    whose: tuple[bytes, bytes] | None = None
    before = at = lines[0]
    for line in read_range(path, lines).split(b"\n"):
        before, at = at, at + len(line) + 1
        if not line:
            continue
        found = BEGINNING.match(line)
        if found is None:
            source, number, split, content = _parse(line)
            own = source.encode("utf-8", "backslashreplace"), repr(split).encode()
        else:
            source, split = None, None
            own = found[1], found[3]
            number, content = int(found[2]), line[found.end() :]
        if own != whose:
            whose = own
            if source is None:
                source, split = own[0].decode(), orjson.loads(own[1])
            begun.append((source, split, len(starts)))
        starts.append(before)
        numbers.append(number)
        digests.append(row_digest(content))
    ends = [*(before for _, _, before in begun), len(starts)][1:]
    runs = [(source, split, end - first) for (source, split, first), end in zip(begun, ends, strict=True)]
    return Scanned(np.array(starts, np.int64), np.array(numbers, np.int64), row_blocks.as_digests(digests), runs)


def _parse(line: bytes) -> tuple[str, int, str | None, bytes]:
    """Source, number, split and content of a line that the stage "data" didn't write."""
    record = parse_line(line)
    return record["source"], record["row"], record["split"], json.dumps({**record, "row": 0}).encode()


def in_blocks(scanned: Iterable[Scanned], size: int) -> list[RecordBlock]:
    """The blocks of a file of `size` bytes, given what was scanned of it, in order."""
    parts = list(scanned)
    starts = np.concatenate([np.zeros(0, np.int64), *(part.starts for part in parts)])
    numbers = np.concatenate([np.zeros(0, np.int64), *(part.numbers for part in parts)])
    digests = np.concatenate([row_blocks.as_digests([]), *(part.digests for part in parts)])
    ends = np.append(starts[1:], size)
    blocks: list[RecordBlock] = []
    first = 0
    for source, split, count in _runs(parts):
        own = slice(first, first + count)
        borders = row_blocks.cut(digests[own], (ends - starts)[own])
        for a, b in pairwise(borders):
            a, b = first + a, first + b
            apart = numbers[a:b] - numbers[a]
            gaps = [] if np.array_equal(apart, np.arange(b - a)) else apart.tolist()
            key = row_blocks.block_key(digests[a:b], source, split, gaps)
            blocks.append(RecordBlock(source, split, int(numbers[a]), b - a, int(starts[a]), int(ends[b - 1]), key))
        first += count
    return blocks


def _runs(parts: list[Scanned]) -> list[tuple[str, str | None, int]]:
    """Source and split of rows that follow one another, and how many these are, over all parts."""
    runs: list[tuple[str, str | None, int]] = []
    for source, split, count in (run for part in parts for run in part.runs):
        if runs and runs[-1][:2] == (source, split):
            count += runs.pop()[2]
        runs.append((source, split, count))
    return runs


def read_range(path: Path, lines: Range) -> bytes:
    """The bytes of a range."""
    start, end = lines
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def parse_line(line: bytes) -> dict[str, Any]:
    """One record of rows.jsonl, half surrogate pairs and all; NaN is a missing value."""
    # orjson rounds integers beyond 64 bits to floats: in a tool call that would be another number, silently.
    if not ((b"tool" in line or b"function" in line) and LONG_NUMBER.search(line)):
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:  # half surrogate pairs, NaN
            pass
    try:
        return json.loads(line, parse_constant=lambda _: None)  # NaN is a missing number
    except (ValueError, RecursionError) as error:
        raise UserError(f"rows.jsonl of the stage data is damaged: {error}: {line[:80]!r}") from error
