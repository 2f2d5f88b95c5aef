"""train.parquet and heldout.parquet: conversations with their ids, in row groups of a size to share out."""

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


def write_conversations(
    path: Path,
    spool: Spool,
    rows: AcceptedRows,
    copies: Integers,
    progress: Progress,
    group: npt.NDArray[np.uint64] | None = None,
) -> TrainFigures:
    """Write each row as often as `copies` (n,) says, in order; figures over the rows, each counted once.

    `group`: (n,), written as the column GROUP.
    """
    figures, size = TrainFigures(), 0
    waiting: list[pa.Table] = []
    schema = SCHEMA if group is None else SCHEMA.append(GROUP)
    names = pa.array(rows.sources, type=pa.string())
    with pq.ParquetWriter(path, schema, **OPTIONS) as writer:
        for part in spool.parts():
            place = spool.slice(part)
            wanted = copies[place]
            chosen = np.flatnonzero(wanted)
            if not len(chosen):
                continue
            columns = spool.read(part)
            columns = columns if len(chosen) == len(columns) else columns.take(pa.array(chosen))
            figures.add(columns)
            chosen += place.start
            table = _table(columns.column("conversation"), rows, chosen, copies[chosen], names)
            if group is not None:
                own = np.repeat(group[chosen], copies[chosen]).tolist()
                table = table.append_column(GROUP, pa.array([f"{one:016x}" for one in own]))
            waiting.append(table)
            size += table.nbytes
            if size >= GROUP_BYTES or sum(map(len, waiting)) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
                waiting, size = [], 0
            progress.line(f"{path.name}: {place.stop:,} of {len(copies):,} rows")
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
    return figures


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
