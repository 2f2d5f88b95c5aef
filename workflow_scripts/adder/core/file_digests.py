"""Digests of files, each read once in its life: parsing stays instant with a 50 GB file, and so do stages and links."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from adder.core.errors import UserError, system_errors_told
from adder.core.files import LEAF, TREE, atomic_write, clone, digest_file, files_in, has_digest, link_or_copy
from adder.core.paths import resolve_path

# Reading less than this isn't worth a word.
WORTH_SAYING = 1 << 28  # bytes
# What changed so recently may change again without another time stamp: file systems count in steps of some ms.
UNSETTLED = 1e9  # nanoseconds


def canonical(value: object) -> str:
    """JSON that is equal for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Stamp(NamedTuple):
    """What the file system tells of a file without reading it: bytes, nanoseconds, numbers.

    `changed` is the change time, which nobody can put back: any writing moves it, and so does a link more or fewer.
    """

    size: int
    modified: int
    inode: int
    changed: int
    links: int

    @classmethod
    def of(cls, file: Path | int) -> "Stamp":
        """The stamp that a file has now, given its path or its descriptor."""
        stat = os.stat(file)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, stat.st_nlink)

    @property
    def content(self) -> str:
        """What any writing changes but one that puts the time stamp back: inode, size, time."""
        return f"{self.inode}-{self.size}-{self.modified}"


class FileDigests:
    """Digests of files below and beside the project's directory `root`, remembered in the file `memory`.

    A file is digested anew when its size, inode or time stamps, the change time among them, are others than those that
    are remembered: it may have been written to and its time stamp put back (`cp -p`, `rsync -a`, `touch -r`). Links
    that come or go move the change time as well; those that Adder makes and removes are carried over (`with_links`).
    `say` is told what takes long.
    """

    def __init__(self, memory: Path, root: Path, say: Callable[[str], object] | None = None):
        self.memory, self.root, self.say = memory, root, say
        self.seen: dict[Path, tuple[Stamp, str]] = {}  # what was asked for, as it was then
        self.known = _read(memory)
        self._new: dict[str, tuple[int, str]] = {}  # not in `memory` yet
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
        inside = {path: files_in(path) if path.is_dir() else [path] for path in paths}
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

    def holds(self, path: Path, digest: str, size: int) -> bool:
        """Whether a file still has the digest that it had when it was written, with `size` bytes.

        It is read unless it is known as it is: a file that was moved or restored from a backup is read once.
        """
        try:
            stamp = Stamp.of(path)
            if stamp.size != size:
                return False
            if not _is_of_kind(digest, stamp):
                return has_digest(path, digest)
            self._say_what_takes_long({path: stamp})
            found = self._digest(path, stamp)
        except OSError:  # gone, or not to be read
            return False
        self._remember()
        return found == digest

    def note(self, digests: dict[Path, str]) -> None:
        """Remember what is known of files already: of those just written."""
        for path, digest in digests.items():
            self._keep(Stamp.of(path), digest)
        self._remember()

    @contextlib.contextmanager
    def with_links(self, files: Iterable[Path]) -> Iterator[None]:
        """Remember what is known of these files, though links to them are made or removed inside.

        Their names may be gone afterwards, as long as they have others.
        """
        before: list[tuple[BinaryIO, Stamp, str]] = []
        with contextlib.ExitStack() as stack:
            for path in files:
                with contextlib.suppress(OSError):
                    file = stack.enter_context(path.open("rb"))
                    stamp = Stamp.of(file.fileno())
                    if (digest := self._known(stamp)) is not None:
                        before.append((file, stamp, digest))
            yield
            for file, stamp, digest in before:
                now = Stamp.of(file.fileno())
                # With as many links as before it is somebody else who has changed it.
                if now.content == stamp.content and now.links not in (0, stamp.links):
                    self._keep(now, digest)
        self._remember()

    def remove(self, path: Path) -> None:
        """Remove a file or folder where it is; its files are remembered under their other names."""
        if path.is_dir():
            with self.with_links(files_in(path)):
                shutil.rmtree(path)
        else:
            with self.with_links([path]):
                path.unlink(missing_ok=True)

    def clone_or_link(self, source: Path, target: Path) -> None:
        """Reflink a file where the file system can, else link_or_copy it; what is known of it is known of both."""
        digest = self._known(Stamp.of(source))
        if not clone(source, target):
            with self.with_links([source]):
                link_or_copy(source, target)
        elif digest is not None and self._known(Stamp.of(source)) == digest:
            self.note({target: digest})

    def link(self, source: Path, target: Path) -> None:
        """link_or_copy a file of the user's, and remember it with its link.

        What has just changed is copied: nothing would tell of another change while it is linked. Large files get older.
        """
        stamp = Stamp.of(source)
        if stamp.size > LEAF and not _is_settled(stamp):
            time.sleep(UNSETTLED / 1e9)
        self.of(source)
        if source in self._unsettled:
            shutil.copy2(source, target)
            return
        with self.with_links([source]):
            link_or_copy(source, target)

    def changed(self) -> list[Path]:
        """The files that were written to, exchanged, linked by others or removed since they were asked for.

        What was exchanged and put back under a link of its own was another file meanwhile.
        """
        remembered = _read(self.memory)

        def is_as_it_was(path: Path, stamp: Stamp, digest: str) -> bool:
            try:
                now = Stamp.of(path)
                if now != stamp and remembered.get(now.content) != (now.changed, digest):
                    return False
                return path not in self._unsettled or has_digest(path, digest)
            except OSError:
                return False

        return [path for path, (stamp, digest) in self.seen.items() if not is_as_it_was(path, stamp, digest)]

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

    def _known(self, stamp: Stamp) -> str | None:
        changed, digest = self.known.get(stamp.content, (None, None))
        return digest if digest is not None and changed == stamp.changed and _is_of_kind(digest, stamp) else None

    def _digest(self, path: Path, stamp: Stamp) -> str:
        digest = self._known(stamp)
        if digest is None:
            is_settled = _is_settled(stamp)  # not by the end of a long reading
            with system_errors_told(path):
                digest = digest_file(path)
            if is_settled:
                self._keep(stamp, digest)
            else:
                self._unsettled[path] = digest
        self.seen[path] = (stamp, digest)
        return digest

    def _keep(self, stamp: Stamp, digest: str) -> None:
        entry = (stamp.changed, digest)
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


def _of_directory(digests: dict[str, str]) -> str:
    return hashlib.blake2b(canonical(digests).encode(), digest_size=20).hexdigest()


def _is_settled(stamp: Stamp) -> bool:
    return stamp.changed < time.time_ns() - UNSETTLED


def _is_of_kind(digest: str, stamp: Stamp) -> bool:
    """Whether it is what `digest_file` gives: other versions may have made digests of large files in another way."""
    return digest.startswith(TREE) == (stamp.size > LEAF)


def _check(known: dict[str, tuple[int, str]]) -> str:
    return hashlib.blake2b(canonical(known).encode(), digest_size=8).hexdigest()


def _read(memory: Path) -> dict[str, tuple[int, str]]:
    """What the file remembers; nothing where it is damaged or another version's."""
    try:
        content = json.loads(memory.read_text())
        known = {stamp: (changed, digest) for stamp, (changed, digest) in content["digests"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return known if content.get("check") == _check(known) else {}
