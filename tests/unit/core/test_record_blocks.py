"""rows.jsonl in blocks: every line in one of them, and equal rows under an equal key wherever they stand."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adder.core import record_blocks, row_blocks
from adder.core.errors import UserError
from adder.core.record_blocks import RecordBlock
from adder.data import raw_rows


def blocks_of(path: Path, *cuts: int) -> list[RecordBlock]:
    """The blocks, scanned in ranges that end behind so many lines."""
    ends = [0]
    for line in path.read_bytes().splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    borders = [0, *(ends[cut] for cut in cuts), ends[-1]]
    scan = record_blocks.scanner(path)
    parts = [scan((a, b)) for a, b in itertools.pairwise(borders)]
    return record_blocks.in_blocks(parts, ends[-1])


def write(path: Path, records: Sequence[tuple[str, int, Any, dict[str, Any]]]) -> Path:
    lines = [raw_rows.encode_record(*record)[0] for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(row_blocks, "SIZE", 4000)


def test_blocks_hold_all_rows_of_one_source_each_wherever_ranges_are_cut(tmp_path):
    records = [("a", n, "train", {"q": f"{n}"}) for n in range(1, 301)] + [("b", n, None, {"q": "x"}) for n in range(9)]
    path = write(tmp_path / "rows.jsonl", records)
    found = blocks_of(path)
    assert found == blocks_of(path, 1, 7, 150, 300, 302) and len(found) > 10
    assert [block.start for block in found[1:]] == [block.end for block in found[:-1]]
    assert found[0].start == 0 and found[-1].end == path.stat().st_size
    assert sum(block.rows for block in found) == 309
    assert {block.split for block in found if block.source == "b"} == {None}
    data = path.read_bytes()
    for block in found:
        lines = [json.loads(line) for line in data[block.start : block.end].splitlines()]
        assert {line["source"] for line in lines} == {block.source} and len(lines) == block.rows
        assert lines[0]["row"] == block.first_row


def test_a_key_tells_rows_and_gaps_but_not_where_the_rows_stand(tmp_path):
    def key(*records: tuple[str, int, Any, dict[str, Any]]) -> str:
        (block,) = blocks_of(write(tmp_path / "rows.jsonl", list(records)))
        return block.key

    first = key(("a", 1, None, {"q": 1}), ("a", 2, None, {"q": 2}))
    assert first == key(("a", 101, None, {"q": 1}), ("a", 102, None, {"q": 2}))
    others = [
        key(("a", 1, None, {"q": 1}), ("a", 3, None, {"q": 2})),
        key(("b", 1, None, {"q": 1}), ("b", 2, None, {"q": 2})),
        key(("a", 1, "train", {"q": 1}), ("a", 2, "train", {"q": 2})),
        key(("a", 1, None, {"q": 1}), ("a", 2, None, {"q": 3})),
        key(("a", 1, None, {"q": 2}), ("a", 2, None, {"q": 1})),
    ]
    assert len({first, *others}) == 6


def test_lines_that_another_hand_wrote_are_read_all_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    records = [{"source": 'a"b', "row": n, "split": None, "data": {"q": "\ud800"}} for n in (4, 5)]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    (block,) = blocks_of(path)
    assert (block.source, block.first_row, block.rows) == ('a"b', 4, 2)
    path.write_text('{"source": "a", "ro')
    with pytest.raises(UserError, match="damaged"):
        blocks_of(path)
    path.write_bytes(b"")
    assert blocks_of(path) == []
