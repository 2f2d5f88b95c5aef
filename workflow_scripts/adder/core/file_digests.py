"""Digests of files, each read once in its life: parsing stays instant with a 50 GB file, and so do stages and links."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from adder.core.errors import UserError
from adder.core.files import LEAF, TREE, atomic_write, digest_file, has_digest
from adder.core.paths import resolve_path

# Reading less than this isn't worth a word.
WORTH_SAYING = 1 << 28  # bytes
# What changed so recently may change again without another time stamp: file systems count in steps of some ms.
UNSETTLED = 1e9  # nanoseconds


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

    @property
    def content(self) -> str:
        """What any writing changes but one that puts the time stamp back: inode, size, time."""
        return f"{self.inode}-{self.size}-{self.modified}"

    def is_other(self, later: "Stamp") -> bool:
        """Whether the file may have another content by then. A change time that came with another number of links is
        that of a link.
        """
        return self.content != later.content or (self.changed != later.changed and self.links == later.links)


class FileDigests:
    """Digests of files below and beside the project's directory `root`, remembered in the file `memory`.

    A file is digested anew when its size, time stamps or inode are others than before: what replaces a file under its
    name and time stamp (`cp -p`, `rsync -a`) has another inode or change time. Links don't count: a file under another
    name is still the same, as the stages and a run's folder have them. `say` is told what takes long.
    """

    def __init__(self, memory: Path, root: Path, say: Callable[[str], object] | None = None):
        self.memory, self.root, self.say = memory, root, say
        self.seen: dict[Path, Stamp] = {}  # what was asked for, as it was then
        self.known = _read(memory)
        self._new: dict[str, tuple[int, int, str]] = {}  # not in `memory` yet
        self._unsettled: dict[Path, str] = {}  # too new for their time stamps to tell of the next change

    @classmethod
    def of_results(cls, results: Path, say: Callable[[str], object] | None = None) -> "FileDigests":
        """Those that are remembered with the results, for the project in the working directory."""
        return cls(results / "cache" / "digests.json", Path.cwd(), say)

    def of(self, path: Path) -> str:
        """Digest of one file (see `digest_file`), or of a directory's files by name (40 hex digits)."""
        return self.of_all([path])[0]

    def of_all(self, paths: list[Path]) -> list[str]:
        """The digest of each of these files and directories."""
        inside = {path: _files_in(path) for path in paths}
        stamps = {file: Stamp.of(file) for files in inside.values() for file in files}
        self._say_what_takes_long(stamps)
        digests = {file: self._digest(file, stamp) for file, stamp in stamps.items()}
        self._remember()
        return [
            _of_directory({str(file.relative_to(path)): digests[file] for file in inside[path]})
            if path.is_dir()
            else digests[path]
            for path in paths
        ]

    def holds(self, path: Path, digest: str, size: int, modified: int, links_hide: bool = False) -> bool:
        """Whether a file still has the digest that it had when it was written, with `size` bytes and that time stamp.

        It is read where something says that it was written to since. links_hide: also where only its links came or
        went, since a change with the time stamp put back may hide behind that.
        """
        try:
            stamp = Stamp.of(path)
        except OSError:
            return False
        if stamp.size != size:
            return False
        found = self.known.get(stamp.content)
        if found is None and stamp.modified == modified and not links_hide:
            return True
        if (known := self._known(stamp, links_hide)) is not None and _is_of_kind(digest, stamp):
            return known == digest
        if not has_digest(path, digest):
            return False
        self.note({path: digest})
        return True

    def note(self, digests: dict[Path, str]) -> None:
        """Remember what is known of files already: of those just written or linked."""
        for path, digest in digests.items():
            self._keep(Stamp.of(path), digest)
        self._remember()

    def changed(self, linked: Iterable[Path] = ()) -> list[Path]:
        """The files that were written to, exchanged or removed since they were asked for.

        Of those that are among the files `linked` by now, the links don't count; of others they do: what was exchanged
        and put back under a link of its own was another file meanwhile.
        """
        own = {path.stat().st_ino for path in linked}

        def is_as_it_was(path: Path, stamp: Stamp) -> bool:
            try:
                now = Stamp.of(path)
            except OSError:
                return False
            if stamp.is_other(now) or (stamp != now and now.inode not in own):
                return False
            return path not in self._unsettled or has_digest(path, self._unsettled[path])

        return [path for path, stamp in self.seen.items() if not is_as_it_was(path, stamp)]

    def named(self, files: list[Path]) -> list[tuple[str, str]]:
        """(name, digest) of each file."""
        return [(path.name, digest) for path, digest in zip(files, self.of_all(files), strict=True)]

    def of_named(self, name: str, where: str) -> str:
        """Digest of the file that the setting `where` names. Raises UserError where there is none."""
        path = resolve_path(name, self.root)
        if not path.is_file():
            raise UserError(f"{where}: there is no file {name!r} (looked for {path})")
        return self.of(path)

    def _say_what_takes_long(self, stamps: dict[Path, Stamp]) -> None:
        unknown = {path: stamp.size for path, stamp in stamps.items() if self._known(stamp) is None}
        size = sum(unknown.values())
        if self.say is not None and size >= WORTH_SAYING:
            more = f" and {len(unknown) - 1} more files" if len(unknown) > 1 else ""
            self.say(f"reading {next(iter(unknown))}{more}, {size / 1e9:.1f} GB, to know the content again: once")

    def _known(self, stamp: Stamp, links_hide: bool = False) -> str | None:
        changed, links, digest = self.known.get(stamp.content, (None, None, None))
        if digest is None or not _is_of_kind(digest, stamp):
            return None
        return digest if changed == stamp.changed or (links != stamp.links and not links_hide) else None

    def _digest(self, path: Path, stamp: Stamp) -> str:
        self.seen[path] = stamp
        digest = self._known(stamp) or digest_file(path)
        if stamp.changed < time.time_ns() - UNSETTLED or stamp.content in self.known:
            self._keep(stamp, digest)
        else:
            self._unsettled[path] = digest
        return digest

    def _keep(self, stamp: Stamp, digest: str) -> None:
        entry = (stamp.changed, stamp.links, digest)
        if self.known.get(stamp.content) != entry and _is_of_kind(digest, stamp):
            self.known[stamp.content] = self._new[stamp.content] = entry

    def _remember(self) -> None:
        if not self._new:
            return
        known = {**_read(self.memory), **self._new}  # others may have remembered some meanwhile
        # Where there is no room it is remembered less, and read again.
        with contextlib.suppress(OSError):
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.memory) as partial:
                partial.write_text(json.dumps({"digests": known, "check": _check(known)}, sort_keys=True))
            self._new = {}


def _files_in(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def _of_directory(digests: dict[str, str]) -> str:
    return hashlib.blake2b(canonical(digests).encode(), digest_size=20).hexdigest()


def _is_of_kind(digest: str, stamp: Stamp) -> bool:
    """Whether it is what `digest_file` gives: other versions may have made digests of large files in another way."""
    return digest.startswith(TREE) == (stamp.size > LEAF)


def _check(known: dict[str, tuple[int, int, str]]) -> str:
    return hashlib.blake2b(canonical(known).encode(), digest_size=8).hexdigest()


def _read(memory: Path) -> dict[str, tuple[int, int, str]]:
    """What the file remembers; nothing where it is damaged or another version's."""
    try:
        content = json.loads(memory.read_text())
        known = {stamp: (changed, links, digest) for stamp, (changed, links, digest) in content["digests"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return known if content.get("check") == _check(known) else {}
