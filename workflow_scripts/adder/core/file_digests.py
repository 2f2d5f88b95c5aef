"""Digests of local files, remembered so that parsing stays instant with a 50 GB file."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from adder.core.errors import UserError
from adder.core.files import atomic_write, digest_file
from adder.core.paths import resolve_path


def canonical(value: object) -> str:
    """JSON that is equal for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Stamp(NamedTuple):
    """What the file system tells of a file's content without reading it: bytes, nanoseconds, numbers."""

    size: int
    modified: int
    inode: int
    changed: int
    links: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp that the file has now."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, stat.st_nlink)

    def is_other(self, later: "Stamp") -> bool:
        """Whether the file may have another content by then. A change time that came with another number of links is
        that of a link.
        """
        return self[:3] != later[:3] or (self.changed != later.changed and self.links == later.links)


class FileDigests:
    """Digests of files below and beside the project's directory `root`, remembered in the file `memory`.

    A file is digested anew when its size, time stamps or inode are others than before: what replaces a file under its
    name and time stamp (`cp -p`, `rsync -a`) has another inode or change time. Links don't count: stages take a local
    model's files that way.
    """

    def __init__(self, memory: Path, root: Path):
        self.memory, self.root = memory, root
        self.seen: dict[Path, Stamp] = {}  # what was asked for, as it was then
        try:
            self.known: dict[str, list] = json.loads(memory.read_text())
        except (OSError, ValueError):
            self.known = {}

    def of(self, path: Path) -> str:
        """Digest (40 hex digits) of one file, or of a directory's files by name."""
        if path.is_dir():
            inner = {str(p.relative_to(path)): self.of(p) for p in sorted(path.rglob("*")) if p.is_file()}
            return hashlib.blake2b(canonical(inner).encode(), digest_size=20).hexdigest()
        stamp = self.seen[path] = Stamp.of(path)
        *before, digest = self.known.get(str(path), [None])
        if before == list(stamp):
            return digest
        if not before or Stamp(*before).is_other(stamp):
            digest = digest_file(path)
        self.known[str(path)] = [*stamp, digest]
        self._remember()
        return digest

    def changed(self) -> list[Path]:
        """The files that were written to, exchanged or removed since they were asked for."""
        return [path for path, stamp in self.seen.items() if not path.exists() or stamp.is_other(Stamp.of(path))]

    def named(self, files: list[Path]) -> list[list[str]]:
        """[name, digest] of each file."""
        return [[path.name, self.of(path)] for path in files]

    def of_named(self, name: str, where: str) -> str:
        """Digest of the file that the setting `where` names. Raises UserError where there is none."""
        path = resolve_path(name, self.root)
        if not path.is_file():
            raise UserError(f"{where}: there is no file {name!r} (looked for {path})")
        return self.of(path)

    def _remember(self) -> None:
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.memory) as partial:
            partial.write_text(json.dumps(self.known, sort_keys=True))
