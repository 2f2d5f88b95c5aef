"""Small files, read and written one way everywhere: JSON with sorted keys, JSON lines, Parquet, digests."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adder.core.hardware import available_cores

if TYPE_CHECKING:
    from io import BufferedReader

    import pyarrow as pa

DIGEST_BYTES = 20
LEAF = 16 << 20  # bytes
TREE = "tree-"
AT_A_TIME = 1 << 20  # bytes
FICLONE = 0x40049409  # of linux/fs.h
MOST_THREADS = 16  # more are faster than any disk


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write one JSON value a line; return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[Any]:
    """Yield the value of each line that is not blank."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def write_table(path: Path, table: "pa.Table") -> None:
    """Write a Parquet file; equal tables give equal bytes."""
    import pyarrow.parquet as pq  # not at the top: the workflow is parsed without it

    pq.write_table(table, path, compression="zstd")


def read_table(path: Path) -> "pa.Table":
    """Read a Parquet file."""
    import pyarrow.parquet as pq

    return pq.read_table(path)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder to; it becomes `path` when the block ends without an error.

    Whoever looks finds `path` whole or as it was before. What an error leaves behind is removed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def clone(source: Path, target: Path) -> bool:
    """Copy a file without taking room (a reflink), with its time stamps and rights; False where the file system can't.

    Btrfs, XFS, bcachefs and ZFS can. Whatever is written to one of the two leaves the other as it is.
    """
    try:
        with source.open("rb") as read, target.open("wb") as written:
            fcntl.ioctl(written.fileno(), FICLONE, read.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    shutil.copystat(source, target)
    return True


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Hard-link a file, which takes no room; copy it where the two places are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_bytes(file: int, start: int, end: int) -> bytes:
    """Bytes of an open file, given its descriptor; several processes may read at once."""
    # One call reads 2 GiB at most.
    chunks = [os.pread(file, min(end - at, 1 << 30), at) for at in range(start, end, 1 << 30)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def digest_file(path: Path) -> str:
    """Digest of a file's content: BLAKE2b of 160 bits as 40 hex digits.

    Above LEAF bytes it is that of BLAKE2's tree mode with one level of leaves, which all cores make at once, and begins
    with TREE, so that no one takes it for the other.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _digest_in_leaves(file.fileno(), size) if size > LEAF else _digest_at_once(file)


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file's content has this digest, in whichever of the two ways that was made."""
    if digest.startswith(TREE):
        return digest_file(path) == digest
    with path.open("rb") as file:
        return _digest_at_once(file) == digest


def _digest_at_once(file: "BufferedReader") -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def _digest_in_leaves(file: int, size: int) -> str:
    """BLAKE2's tree mode (https://www.blake2.net/blake2.pdf, 2.10) with unlimited fanout and depth 2."""
    node = partial(
        hashlib.blake2b, digest_size=DIGEST_BYTES, inner_size=DIGEST_BYTES, fanout=0, depth=2, leaf_size=LEAF
    )
    leaves = -(-size // LEAF)

    def leaf(number: int) -> bytes:
        digest = node(node_offset=number, last_node=number == leaves - 1)
        for start in range(number * LEAF, min(size, (number + 1) * LEAF), AT_A_TIME):
            digest.update(os.pread(file, min(AT_A_TIME, (number + 1) * LEAF - start), start))
        return digest.digest()

    root = node(node_depth=1, last_node=True)
    # hashlib and pread let other threads run meanwhile.
    with ThreadPoolExecutor(min(leaves, available_cores(), MOST_THREADS)) as pool:
        for digest in pool.map(leaf, range(leaves)):
            root.update(digest)
    return TREE + root.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, as people publish it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
