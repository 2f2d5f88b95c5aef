"""Rows in blocks whose borders their content decides, so that what was made of a block is known again in another file.

A row added, removed or changed anywhere changes the block that it is in, and at most the next few: behind the first
border that both ways of cutting have in common all blocks are what they were (content-defined chunking; Muthitacharoen,
Chen and Mazières 2001, "A low-bandwidth network file system", section 3.1).
"""

import hashlib
import platform
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from adder.core.file_digests import canonical

Digests = npt.NDArray[np.uint8]  # (rows, DIGEST)
Integers = npt.NDArray[np.int64]

DIGEST = 16  # bytes of a row's
SIZE = 1 << 20  # bytes of a block on the average; a fourth of it at least, four times as much at most
ROW = 200  # bytes that a row counts beside its own


def row_digest(content: bytes | memoryview) -> bytes:
    """What a row is known by, DIGEST bytes."""
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def as_digests(found: list[bytes]) -> Digests:
    """The digests of several rows, uint8 (rows, DIGEST)."""
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST)


def cut(digests: Digests, sizes: Integers) -> list[int]:
    """Where blocks begin, and the number of rows: block b holds the rows from border b to border b + 1.

    sizes: bytes of each row. A block may end behind a row whose digest is low, the more likely the larger the row.
    """
    if not len(digests):
        return [0]
    counted = sizes + ROW
    total = np.cumsum(counted)
    low = digests[:, :8].copy().view(">u8").ravel() / 2.0**64 < counted / SIZE
    ends = np.flatnonzero(low) + 1
    at = total[ends - 1]
    borders = [0]
    while borders[-1] < len(digests):
        before = int(total[borders[-1] - 1]) if borders[-1] else 0
        place = int(np.searchsorted(at, before + SIZE // 4))
        most = int(np.searchsorted(total, before + 4 * SIZE)) + 1
        borders.append(min(int(ends[place]) if place < len(ends) else len(digests), most, len(digests)))
    return borders


def block_key(digests: Digests, *more: Any) -> str:
    """What a block is known by (32 hex digits): its rows' digests, and JSON that it depends on beside them."""
    known_by = hashlib.blake2b(canonical(more).encode(), digest_size=16)
    known_by.update(digests.tobytes())
    return known_by.hexdigest()


def meaning(*parts: Any) -> str:
    """Digest (32 hex digits) of JSON that decides, beside its rows, what is made of a block."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=16).hexdigest()


def versions(*distributions: str) -> dict[str, str]:
    """The versions of Python and of libraries, for `meaning`."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in distributions}}
