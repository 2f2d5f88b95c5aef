"""Accepted conversations on disk while it is decided what becomes of them: parts in order, each an Arrow stream."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
READ = pa.ipc.IpcReadOptions(use_threads=False)


def pack(
    conversations: list[bytes], figures: npt.NDArray[np.int32], prompt_words: list[str], reply_words: list[str]
) -> bytes:
    """A part of the spool as bytes. `conversations`: JSON in UTF-8; `figures`: (rows, len(FIGURES))."""
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
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA, options=WRITE) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


class Spool:
    """A temporary file of parts; `starts` (parts + 1) counts the rows before each part."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        path.unlink()  # the file goes with the process, however that ends
        self._ends = [0]
        self._rows = [0]
        self.starts: Integers = np.zeros(1, np.int64)

    def append(self, part: bytes, rows: int) -> None:
        """Add one part of so many rows."""
        self._file.write(part)
        self._ends.append(self._ends[-1] + len(part))
        self._rows.append(self._rows[-1] + rows)

    def finish(self) -> None:
        """Make everything readable, here and in processes forked from here on."""
        self._file.flush()
        self.starts = np.array(self._rows, np.int64)

    def parts(self) -> range:
        """Numbers of all parts."""
        return range(len(self._ends) - 1)

    def read(self, part: int) -> pa.RecordBatch:
        """One part; several processes may read at once."""
        start, end = self._ends[part], self._ends[part + 1]
        # One call reads 2 GiB at most.
        chunks = [os.pread(self._file.fileno(), min(end - at, 1 << 30), at) for at in range(start, end, 1 << 30)]
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        return pa.ipc.open_stream(data, options=READ).read_next_batch()

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
