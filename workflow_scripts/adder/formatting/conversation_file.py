"""train.parquet and heldout.parquet: conversations with their ids, in row groups of a size to share out."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from adder.core.progress import Progress
from adder.formatting.accepted_rows import AcceptedRows
from adder.formatting.card_figures import TrainFigures
from adder.formatting.heldout_split import scramble
from adder.formatting.spool import Spool

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # "source:row"; "source:row#2" where a weight repeats a row
        ("source", pa.string()),
        ("conversation", pa.string()),  # JSON of a conversation.Conversation
        ("digest", pa.int64()),  # of the content; samples are drawn by it
    ]
)
GROUP = pa.field("group", pa.string())  # 16 hex digits that tell rows that are alike to the evaluation
GROUP_ROWS, GROUP_BYTES = 8192, 32 << 20  # of a row group of Parquet, the unit in which the next stage reads
OPTIONS: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["source"]}

Integers = npt.NDArray[np.int64]


class ConversationFile:
    """A file of conversations that is written part by part; `figures` are over its rows, each counted once.

    copies: how often each row is written, (n,). group: (n,), written as the column GROUP.
    """

    def __init__(self, path: Path, copies: Integers, group: npt.NDArray[np.uint64] | None = None) -> None:
        self.copies, self.group, self.figures = copies, group, TrainFigures()
        self._writer = pq.ParquetWriter(path, SCHEMA if group is None else SCHEMA.append(GROUP), **OPTIONS)
        self._waiting: list[pa.Table] = []
        self._bytes = 0
        # Compressed while the next part is read.
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def add(self, columns: pa.RecordBatch, rows: AcceptedRows, place: slice, names: pa.Array) -> None:
        """Take a part of the spool, the rows of `place`."""
        chosen = np.flatnonzero(self.copies[place])
        if not len(chosen):
            return
        columns = columns if len(chosen) == len(columns) else columns.take(pa.array(chosen))
        self.figures.add(columns)
        chosen += place.start
        table = _table(columns.column("conversation"), rows, chosen, self.copies[chosen], names)
        if self.group is not None:
            own = np.repeat(self.group[chosen], self.copies[chosen]).tolist()
            table = table.append_column(GROUP, pa.array([f"{one:016x}" for one in own]))
        self._waiting.append(table)
        self._bytes += table.nbytes
        if self._bytes >= GROUP_BYTES or sum(map(len, self._waiting)) >= GROUP_ROWS:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._write()
        if self._written is not None:
            self._written.result()
        self._thread.shutdown()
        self._writer.close()

    def _write(self) -> None:
        if self._written is not None:
            self._written.result()
        table = pa.concat_tables(self._waiting)
        self._waiting, self._bytes = [], 0
        self._written = self._thread.submit(self._writer.write_table, table, row_group_size=GROUP_ROWS)


def write_conversations(
    files: Sequence[ConversationFile], spool: Spool, rows: AcceptedRows, progress: Progress
) -> None:
    """Write some files of the rows, in order, in one pass over the spool."""
    names = pa.array(rows.sources, type=pa.string())
    for part in spool.parts():
        place = spool.slice(part)
        if any(file.copies[place].any() for file in files):
            columns = spool.read(part)
            for file in files:
                file.add(columns, rows, place, names)
        progress.line(f"{place.stop:,} of {len(rows.row):,} rows written")
    for file in files:
        file.close()


def _table(conversation: pa.Array, rows: AcceptedRows, chosen: Integers, copies: Integers, names: pa.Array) -> pa.Table:
    """The table of some rows, each repeated; repeats of a row differ in id and digest."""
    join = cast("Any", pc).binary_join_element_wise  # pyarrow makes its functions at run time, without types
    repeated = np.repeat(np.arange(len(chosen)), copies)
    number = np.arange(len(repeated)) - np.repeat(np.cumsum(copies) - copies, copies)
    index = chosen[repeated]
    digest = rows.digest[index]
    source = names.take(pa.array(rows.source[index]))
    identity = join(source, pc.cast(pa.array(rows.row[index]), pa.string()), ":")
    if len(repeated) > len(chosen):
        conversation = conversation.take(pa.array(repeated))
        suffixes = pa.array(["", *(f"#{n}" for n in range(2, int(copies.max()) + 1))])
        identity = join(identity, suffixes.take(pa.array(number)), "")
        digest = np.where(number == 0, digest, scramble(digest ^ scramble(number.astype(np.uint64), 3), 4))
    arrays = [identity, source, conversation.cast(pa.string()), pa.array(digest.view(np.int64))]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
