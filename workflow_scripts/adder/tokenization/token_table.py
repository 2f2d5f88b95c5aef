"""Tokenised examples on disk, mapped into memory: any of them is there at once, and none takes memory for good."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from adder.core.labels import IGNORE_INDEX

Tokens = npt.NDArray[np.int32]

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),  # IGNORE_INDEX where a token carries no loss; not shifted
        ("tokens", pa.int32()),
        ("labelled", pa.int32()),  # tokens that carry loss; the first never does, for nothing predicts it
        ("digest", pa.int64()),  # of the conversation: samples are drawn by it
    ]
)


class TokenRow(TypedDict):
    """One example; `labels` aren't shifted."""

    id: str
    input_ids: list[int]
    labels: list[int]


class TokenTable:
    """The rows of an Arrow IPC file of SCHEMA. Lists come as numpy views (int32) of the file itself."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._lists = cache(self._list_buffers)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> npt.NDArray[Any]:
        """All values of a column of numbers."""
        parts = [np.asarray(batch.column(name)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def ids(self, rows: Iterable[int]) -> list[str]:
        """Names of some rows."""
        places = [self._place(row) for row in rows]
        return [self._batches[batch].column("id")[inner].as_py() for batch, inner in places]

    def input_ids(self, row: int) -> Tokens:
        """Token ids of one row."""
        return self._list("input_ids", row)

    def labels(self, row: int) -> Tokens:
        """Labels of one row."""
        return self._list("labels", row)

    def largest_id(self) -> int:
        """The largest token id of all rows; -1 where there is none."""
        found = [self._lists("input_ids", batch) for batch in range(len(self._batches))]
        ids = [values[offsets[0] : offsets[-1]] for values, offsets in found]
        return max((int(own.max()) for own in ids if len(own)), default=-1)

    def loss_batches(self) -> Iterator[tuple[int, npt.NDArray[np.bool_], npt.NDArray[np.int64]]]:
        """The rows in batches: the first row's number, which tokens carry loss (bool (tokens,), all rows' one after the
        other), and where each row begins among them (int64 (rows + 1,)).
        """
        for batch, first in enumerate(self._starts[:-1].tolist()):
            values, offsets = self._lists("labels", batch)
            borders = offsets.astype(np.int64)
            carries = values[borders[0] : borders[-1]] != IGNORE_INDEX
            borders = borders - borders[0]
            carries[borders[:-1][borders[:-1] < borders[1:]]] = False  # nothing predicts a row's first token
            yield first, carries, borders

    def row(self, row: int) -> TokenRow:
        """One row, its lists of plain numbers."""
        batch, inner = self._place(row)
        name = self._batches[batch].column("id")[inner].as_py()
        return {"id": name, "input_ids": self.input_ids(row).tolist(), "labels": self.labels(row).tolist()}

    def _place(self, row: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, int(row - self._starts[batch])

    def _list(self, name: str, row: int) -> Tokens:
        batch, inner = self._place(row)
        values, offsets = self._lists(name, batch)
        return values[offsets[inner] : offsets[inner + 1]]

    def _list_buffers(self, name: str, batch: int) -> tuple[Tokens, Tokens]:
        column = self._batches[batch].column(name)
        return np.asarray(column.values), np.asarray(column.offsets)
