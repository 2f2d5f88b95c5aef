"""What readers of files make, and what they need to know of a file."""

from dataclasses import dataclass
from typing import Any

MAX_RAW = 500  # characters of an unreadable row that are kept to show it


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be read: why, how it begins, and the kind of reason, by which such rows are counted."""

    reason: str
    raw: str = ""
    kind: str = "other"


class Unfit:
    """Stands for a value within a row whose type JSON can't hold; no dataclass, which orjson would write as it is."""

    def __init__(self, type: str) -> None:
        self.type = type

    def __repr__(self) -> str:  # part of what `sample` hashes, so no address
        return f"Unfit({self.type!r})"


Row = dict[str, Any] | Unreadable


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a file is to be read.

    encoding: of text formats, as `readers.fitting_encoding` returned it. convert: a Python file of the user's that
    reads the file. split: the part of a file or folder that has several; table: of an SQLite file, or a sheet. Of a CSV
    file, delimiter: None to find it; header: the names of its columns where it has none; columns: names that the
    settings say it has.
    """

    format: str
    encoding: str | None = None
    convert: str | None = None
    split: str | None = None
    table: str | None = None
    delimiter: str | None = None
    header: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
