"""What earlier runs of a stage made of blocks of rows, to be taken over where the same would come out.

In the stage's folder: `blocks.bin`, the bytes of one block after the other, and `blocks.json`, its Index, unless the
stage has other names for them. They go when the folder is pruned.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

from adder.core import row_blocks
from adder.core.files import read_bytes
from adder.core.stage_spec import Earlier

PAYLOAD, INDEX = "blocks.bin", "blocks.json"


class Entry(TypedDict):
    """A block: its key; digest of what it was made by, beside its rows; where its pieces begin in PAYLOAD, and where
    the last ends; what is told of it, as JSON.
    """

    key: str
    meaning: str
    borders: list[int]
    told: Any


class Index(TypedDict):
    """blocks.json. made_by: digest of code and versions."""

    made_by: str
    blocks: list[Entry]


class KeptBlock(NamedTuple):
    """What is kept of a block: pieces of bytes, and JSON."""

    pieces: list[bytes]
    told: Any


class EarlierBlocks:
    """The blocks in the folders of earlier results, as far as these were made by the same code and libraries."""

    def __init__(
        self, earlier: Earlier, code: str, *libraries: str, payload: str = PAYLOAD, index: str = INDEX
    ) -> None:
        """code: the module that, with all that it imports, makes the blocks. payload, index: names of the files."""
        self._names = payload, index
        self.made_by = row_blocks.meaning(earlier.code(code), row_blocks.versions(*libraries))
        self._made: dict[tuple[str, str], tuple[BinaryIO, Entry]] = {}
        self._told: dict[str, Any] = {}
        for folder in earlier.folders:
            self._look_into(folder)

    def _look_into(self, folder: Path) -> None:
        try:
            payload, index_name = self._names
            file = (folder / payload).open("rb")  # stays readable when the folder is pruned meanwhile
            index: Index = json.loads((folder / index_name).read_bytes())
        except OSError:
            return
        if index["made_by"] != self.made_by:
            file.close()
            return
        for entry in index["blocks"]:
            self._told.setdefault(entry["key"], entry["told"])
            self._made.setdefault((entry["key"], entry["meaning"]), (file, entry))

    def told(self, key: str) -> Any:
        """What is told of a block, whatever it was made by; None where there is none."""
        return self._told.get(key)

    def has(self, key: str, meaning: str) -> bool:
        """Whether there is a block that was made by what `meaning` stands for."""
        return (key, meaning) in self._made

    def get(self, key: str, meaning: str) -> KeptBlock:
        """That block. Raises KeyError where there is none."""
        file, entry = self._made[key, meaning]
        borders = entry["borders"]
        data = read_bytes(file.fileno(), borders[0], borders[-1])
        cuts = [border - borders[0] for border in borders]
        return KeptBlock([data[a:b] for a, b in pairwise(cuts)], entry["told"])


class BlockIndex:
    """The index of this run's blocks, which are written one after the other."""

    def __init__(self, made_by: str) -> None:
        self._index: Index = {"made_by": made_by, "blocks": []}
        self._end = 0

    def add(self, key: str, meaning: str, sizes: list[int], told: Any) -> None:
        """Take the next block. sizes: bytes of its pieces."""
        borders = [self._end]
        for size in sizes:
            borders.append(borders[-1] + size)
        self._end = borders[-1]
        self._index["blocks"].append({"key": key, "meaning": meaning, "borders": borders, "told": told})

    def skip(self, size: int) -> None:
        """Pass over so many bytes of the payload, which no later run takes over."""
        self._end += size

    def write(self, path: Path) -> None:
        """Write it; equal blocks give equal bytes."""
        path.write_text(json.dumps(self._index, separators=(",", ":")), encoding="ascii")
