"""Tokenised examples on disk: any row at once, across record batches."""

import numpy as np
import pytest

from adder.core.labels import IGNORE_INDEX
from adder.tokenization.token_table import TokenTable
from tiny import write_tokens


@pytest.fixture
def rows():
    return [
        {"id": f"a:{n}", "input_ids": list(range(n + 1)), "labels": [IGNORE_INDEX] + [7] * n, "digest": -n}
        for n in range(12)  # write_tokens makes batches of five
    ]


def test_every_row_comes_back_as_it_was_written(tmp_path, rows):
    write_tokens(tmp_path / "t.arrow", rows)
    table = TokenTable(tmp_path / "t.arrow")
    assert len(table) == 12
    assert [table.row(n) for n in range(12)] == [{k: v for k, v in row.items() if k != "digest"} for row in rows]
    assert table.ids(np.array([11, 0, 5])) == ["a:11", "a:0", "a:5"]
    assert table.column("tokens").tolist() == [n + 1 for n in range(12)]
    assert table.column("labelled").tolist() == list(range(12))
    assert table.column("digest").tolist() == [-n for n in range(12)]
    assert table.input_ids(6).dtype == table.labels(6).dtype == np.int32


def test_no_rows_are_an_empty_table(tmp_path):
    write_tokens(tmp_path / "t.arrow", [])
    table = TokenTable(tmp_path / "t.arrow")
    assert len(table) == 0 and len(table.column("tokens")) == 0 and table.ids([]) == []
