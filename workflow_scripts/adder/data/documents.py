"""Text and Markdown files as documents: each file is one row with its `text`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from adder.data.row_types import Row

Reader = Callable[[Path, str], Row]


def rows(documents: Sequence[tuple[Path, str]], read: Reader) -> Iterator[tuple[int, Row]]:
    """Yield (number from 1, row) of documents, each a path and its encoding, which `read` reads."""
    for number, (path, encoding) in enumerate(documents, 1):
        yield number, read(path, encoding)


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder in which all files are."""
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder
