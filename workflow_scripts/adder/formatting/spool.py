"""Accepted conversations on disk while it is decided what becomes of them: parts in order, each an Arrow stream.

The file may be kept for later runs, beside other bytes of each part's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from adder.core.files import read_bytes

Integers = npt.NDArray[np.int64]

# Messages of each role; characters of all but the replies, and of the replies.
FIGURES = ("system", "user", "assistant", "tool", "prompt_characters", "reply_characters")
NO_PROMPT = -1  # prompt_characters of a plain text
# `conversation` is JSON; the words are the first of the first user message and of the first reply, or "".
SCHEMA = pa.schema(
    [("conversation", pa.large_string())]
    + [(name, pa.int32()) for name in FIGURES]
    + [("prompt_word", pa.string()), ("reply_word", pa.string())]
)
# One thread: parts are written and read in forked workers.
WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
READ = pa.ipc.IpcReadOptions(use_threads=False, included_fields=list(range(len(SCHEMA))))


def pack(
    conversations: list[bytes],
    figures: npt.NDArray[np.int32],
    prompt_words: list[str],
    reply_words: list[str],
    columns: Mapping[str, npt.NDArray[Any]] | None = None,
) -> bytes:
    """A part of the spool as bytes. `conversations`: JSON in UTF-8; `figures`: (rows, len(FIGURES)); `columns`: further
    ones, (rows,) or uint8 (rows, width).
    """
    offsets = np.zeros(len(conversations) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, conversations), np.int64, len(conversations)), out=offsets[1:])
    # Put together from bytes: a string a row would be decoded and encoded again.
    buffers = pa.py_buffer(offsets), pa.py_buffer(b"".join(conversations))
    arrays = [
        pa.LargeStringArray.from_buffers(len(conversations), *buffers),
        *(pa.array(np.ascontiguousarray(column)) for column in figures.T),
        pa.array(prompt_words, type=pa.string()),
        pa.array(reply_words, type=pa.string()),
    ]
    more = {name: _as_arrow(values) for name, values in (columns or {}).items()}
    schema = pa.schema([*SCHEMA, *((name, array.type) for name, array in more.items())])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=WRITE) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([*arrays, *more.values()], schema=schema))
    return sink.getvalue().to_pybytes()


def unpack(part: bytes) -> pa.RecordBatch:
    """A part's columns of SCHEMA."""
    return pa.ipc.open_stream(part, options=READ).read_next_batch()


def _as_arrow(values: npt.NDArray[Any]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, buffer])


def _as_numpy(array: pa.Array) -> npt.NDArray[Any]:
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
        return flat.reshape(len(array), width)
    return array.to_numpy()


class Spool:
    """A file of parts; `starts` (parts + 1) counts the rows before each part. It is temporary unless it is kept.

    places: where each part stands in the file. keys: equal for parts of equal rows, "" where it isn't known.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        self.path, self.kept = path, keep
        self._file = path.open("w+b")
        if not keep:
            path.unlink()  # the file goes with the process, however that ends
        self.places: list[tuple[int, int]] = []
        self.keys: list[str] = []
        self._end = 0
        self._rows = [0]
        self.starts: Integers = np.zeros(1, np.int64)

    def append(self, part: bytes, rows: int, beside: bytes = b"", key: str = "") -> None:
        """Add one part of so many rows, and behind it bytes that only later runs read."""
        self.keys.append(key)
        self._file.write(part)
        self._file.write(beside)
        self.places.append((self._end, self._end + len(part)))
        self._end += len(part) + len(beside)
        self._rows.append(self._rows[-1] + rows)

    def finish(self) -> None:
        """Make everything readable, here and in processes forked from here on."""
        self._file.flush()
        self.starts = np.array(self._rows, np.int64)

    def parts(self) -> range:
        """Numbers of all parts."""
        return range(len(self.places))

    def read(self, part: int) -> pa.RecordBatch:
        """One part's columns of SCHEMA; several processes may read at once."""
        return unpack(self._bytes(part))

    def columns(self, part: int) -> dict[str, npt.NDArray[Any]]:
        """One part's further columns."""
        data = self._bytes(part)
        fields = pa.ipc.open_stream(data).schema.names
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=list(range(len(SCHEMA), len(fields))))
        batch = pa.ipc.open_stream(data, options=options).read_next_batch()
        return {name: _as_numpy(batch.column(name)) for name in batch.schema.names}

    def _bytes(self, part: int) -> bytes:
        return read_bytes(self._file.fileno(), *self.places[part])

    def slice(self, part: int) -> slice:
        """The rows of a part, in the order of all rows."""
        return slice(int(self.starts[part]), int(self.starts[part + 1]))

    def conversations(self, rows: Integers) -> list[str]:
        """The conversations (JSON) of some rows, in their order."""
        texts: dict[int, str] = {}
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(owners).tolist():
            column = self.read(part).column("conversation")
            for row in rows[owners == part].tolist():
                texts[row] = column[row - int(self.starts[part])].as_py()
        return [texts[row] for row in rows.tolist()]
