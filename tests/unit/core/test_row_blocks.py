"""Blocks whose borders their content decides."""

import itertools
import random

import numpy as np
import pytest

from adder.core import row_blocks


def keys(rows: list[bytes]) -> list[str]:
    digests = row_blocks.as_digests([row_blocks.row_digest(row) for row in rows])
    borders = row_blocks.cut(digests, np.array([len(row) for row in rows], np.int64))
    assert borders[0] == 0 and borders[-1] == len(rows) and borders == sorted(set(borders))
    return [row_blocks.block_key(digests[a:b]) for a, b in itertools.pairwise(borders)]


@pytest.fixture
def rows(monkeypatch) -> list[bytes]:
    monkeypatch.setattr(row_blocks, "SIZE", 8000)
    random.seed(7)
    return [random.randbytes(random.randrange(5, 200)) for _ in range(4000)]


def test_a_change_anywhere_costs_a_few_blocks(rows):
    before = keys(rows)
    assert 60 < len(before) < 250
    for place in (0, 1, 1234, 3999):
        for changed in (
            [*rows[:place], b"new", *rows[place:]],
            [*rows[:place], *rows[place + 1 :]],
            [*rows[:place], b"other", *rows[place + 1 :]],
        ):
            assert len(set(keys(changed)) - set(before)) <= 6


def test_blocks_have_bounds_whatever_the_rows_are(monkeypatch):
    monkeypatch.setattr(row_blocks, "SIZE", 8000)
    for row in (b"", b"same", b"x" * 100_000):
        digests = row_blocks.as_digests([row_blocks.row_digest(row)] * 3000)
        sizes = np.full(3000, len(row), np.int64)
        each = np.diff(row_blocks.cut(digests, sizes)) * (len(row) + row_blocks.ROW)
        assert each[:-1].min() >= 2000 and each.max() < 4 * 8000 + len(row) + row_blocks.ROW + 1
    assert row_blocks.cut(digests[:0], sizes[:0]) == [0]


def test_a_key_depends_on_rows_and_what_else_is_told():
    digests = row_blocks.as_digests([row_blocks.row_digest(b"a"), row_blocks.row_digest(b"b")])
    assert (
        len({row_blocks.block_key(digests), row_blocks.block_key(digests[::-1]), row_blocks.block_key(digests, 1)}) == 3
    )


def test_a_meaning_changes_with_any_part_and_with_no_order_of_keys():
    assert row_blocks.meaning({"a": 1, "b": 2}) == row_blocks.meaning({"b": 2, "a": 1})
    assert row_blocks.meaning({"a": 1}) != row_blocks.meaning({"a": 2})
    assert row_blocks.versions("numpy")["numpy"] == np.__version__
