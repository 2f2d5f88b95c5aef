"""Files that may be compressed, known by their first bytes: gzip, Zstandard, xz, bzip2, and a zip of one file."""

import bz2
import contextlib
import io
import lzma
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from adder.core.errors import UserError

SUFFIXES = (".gz", ".zst", ".zstd", ".xz", ".bz2", ".zip")
# By a file's first bytes; "BZh" alone could be a text.
COMPRESSIONS = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},
}
CHUNK = 1 << 20  # bytes read at a time


class _Decompressed(io.RawIOBase):
    """A stream whose mistakes are all OSErrors, as those of a file are."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self.stream.read(len(buffer))
        except (EOFError, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise OSError(str(error)) from error
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self.stream.close()
        super().close()


def open_bytes(path: Path) -> "io.BufferedReader[Any]":
    """Open a file for reading, through its decompression where its first bytes say that it is compressed."""
    file = io.BufferedReader(io.FileIO(path), CHUNK)
    compression = _compression(file.peek(16))
    if compression is None:
        return file
    file.close()
    return io.BufferedReader(OPENERS[compression](path), CHUNK)


def is_compressed(start: bytes) -> bool:
    """Whether a file's first 16 bytes say that it is compressed."""
    return _compression(start) is not None


def bare_name(path: Path) -> str:
    """A file's name without the ending of its compression; of `rows.zip` the name of the file that it holds."""
    name = path.name
    if not name.lower().endswith(SUFFIXES):
        return name
    bare = name.rpartition(".")[0]
    if name.lower().endswith(".zip") and not Path(bare).suffix and zipfile.is_zipfile(path):
        return Path(_only_member(path)).name
    return bare


@contextlib.contextmanager
def uncompressed(path: Path) -> Iterator[Path]:
    """The file itself, or a temporary one with what it holds where it is compressed: for what is not read in order."""
    with path.open("rb") as file:
        compression = _compression(file.read(16))
    if compression is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="adder-") as folder:
        plain = Path(folder) / "file"
        with open_bytes(path) as file, plain.open("wb") as copy:
            shutil.copyfileobj(file, copy, CHUNK)
        yield plain


def _compression(start: bytes) -> str | None:
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def _by_pyarrow(codec: str) -> Callable[[Path], io.RawIOBase]:
    def opened(path: Path) -> io.RawIOBase:
        import pyarrow as pa

        return cast(io.RawIOBase, pa.CompressedInputStream(pa.OSFile(str(path)), codec))

    return opened


def _only_member(path: Path) -> str:
    """The name of the one file that a zip holds. Raises UserError where there are more or none."""
    with zipfile.ZipFile(path) as archive:
        members = [
            info.filename
            for info in archive.infolist()
            if not info.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in info.filename.split("/"))
        ]
    if len(members) != 1:
        found = ", ".join(members[:5]) + (", …" if len(members) > 5 else "")
        raise UserError(
            f"{path}: a zip is read where it holds one file; this one holds {len(members)}"
            + (f" ({found}): unpack it, and name them by a pattern" if members else "")
        )
    return members[0]


def _open_zip(path: Path) -> io.RawIOBase:
    try:
        return _Decompressed(cast(BinaryIO, zipfile.ZipFile(path).open(_only_member(path))))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # RuntimeError: a password
        raise OSError(str(error)) from error


def _open_xz(path: Path) -> io.RawIOBase:
    return _Decompressed(cast(BinaryIO, lzma.LZMAFile(path)))


def _open_bz2(path: Path) -> io.RawIOBase:
    return _Decompressed(cast(BinaryIO, bz2.BZ2File(path)))


OPENERS: dict[str, Callable[[Path], io.RawIOBase]] = {
    "gzip": _by_pyarrow("gzip"),
    "zstd": _by_pyarrow("zstd"),
    "xz": _open_xz,
    "bz2": _open_bz2,
    "zip": _open_zip,
}
