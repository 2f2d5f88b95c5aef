"""Which files are opened by code of the user's, who knows of files that the settings don't name."""

import contextlib
import importlib.util
import os
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests, Stamp
from adder.core.stage_spec import Context

# Of Python, its libraries and their caches, and the system: not what a user's code reads of its own.
CACHES = map(
    os.environ.get, ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
)
HIDDEN = os.path.join(os.path.expanduser("~"), ".")  # .cache, .local, .triton, .config and the like
COMPILED = os.path.join(tempfile.gettempdir(), "torchinductor_")
NOT_OWN = (
    HIDDEN,
    COMPILED,
    *(
        f"{os.path.realpath(place)}{os.sep}"
        for place in (
            *(sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parents[1]),
            *("/usr", "/etc", "/proc", "/sys", "/dev", "/lib", "/run"),
            *filter(None, CACHES),
        )
    ),
)
SHOWN = 5  # names of files in a sentence
ASKS = {
    **dict.fromkeys(("socket.connect", "socket.getaddrinfo", "urllib.Request"), "the network"),
    **dict.fromkeys(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"), "other programs"),
}
ABSENT = "absent"  # instead of the digest of what was looked for in vain

Opened = dict[Path, Stamp | None]
_watching: list["Watch"] = []
_hooked = False


class Watch:
    """What was opened to be read, as it was then (None: it wasn't there), and what was asked of others."""

    def __init__(self) -> None:
        self.opened: Opened = {}
        self.asked: set[str] = set()
        self.written: set[Path] = set()

    def see(self, name: str, is_written: bool) -> None:
        """Take note of a file that is opened."""
        path = Path(os.path.abspath(name))
        if path.suffix == ".pyc":  # what is read for a source, whether that is there or not
            try:
                path = Path(importlib.util.source_from_cache(path))
            except ValueError:
                return
        if is_written:
            self.written.add(path)
        elif path not in self.opened and path not in self.written and not str(path).startswith(NOT_OWN):
            try:
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    self.opened[path] = Stamp.of(path)
            except OSError:
                self.opened[path] = None


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Yield the Watch of what Python code opens and asks inside.

    Left out are Python's own, the system's and what was written inside before. What a library opens by itself, as
    pyarrow does, isn't seen, but for SQLite's databases.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for the rest of the process's life
        _hooked = True
    watch = Watch()
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching:
        return
    if event in ASKS:
        for watch in _watching:
            watch.asked.add(ASKS[event])
    if event not in ("open", "sqlite3.connect") or _is_for_a_message():
        return
    name, flags = arguments[0], arguments[2] if event == "open" else os.O_RDONLY
    if isinstance(name, bytes | os.PathLike):
        name = os.fsdecode(name)
    if isinstance(name, str) and isinstance(flags, int):
        is_written = flags & os.O_ACCMODE == os.O_WRONLY or bool(flags & (os.O_CREAT | os.O_TRUNC))
        for watch in _watching:
            watch.see(name, is_written)


def _is_for_a_message() -> bool:
    """Whether a file is opened to show one of its lines, in a warning or a traceback."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == "linecache":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def noted(
    whose: str, known: Iterable[Path], also_read: dict[str, str], context: Context, only_files: bool = False
) -> Iterator[None]:
    """Add to `also_read` the digests of what code of the user's, the file `whose`, opens inside beside what is `known`
    to decide the result, and say so; also what it asks of others, unless `only_files`, as where libraries ask as well.

    Raises UserError where that changes meanwhile.
    """
    with watched() as watch:
        yield
    of_known = {path.resolve() for path in known}
    own = {path: stamp for path, stamp in watch.opened.items() if path.resolve() not in of_known}
    found = digests_of(own, FileDigests.of_results(context.results))
    also_read |= found
    if found:
        names = ", ".join(list(found)[:SHOWN]) + (" …" if len(found) > SHOWN else "")
        context.progress.say(
            f"{whose} also reads {len(found):,} files that the settings don't name: {names}. Where one changes, this "
            "stage runs anew"
        )
    if watch.asked and not only_files:
        context.progress.say(
            f"{whose} asks {' and '.join(sorted(watch.asked))}: nothing tells when these answer otherwise, so this "
            "stage doesn't run anew for it"
        )


def digests_of(opened: Opened, digests: FileDigests) -> dict[str, str]:
    """Digests of what was opened, ABSENT for what wasn't there, by path as seen from the working directory.

    Raises UserError for what has changed since it was opened.
    """
    for path, before in opened.items():
        now = Stamp.of(path) if path.is_file() else None
        if now != before:
            raise UserError(f"{path}: changed while being read; start the workflow again once nobody writes to it")
    here = Path.cwd()
    names = {path: str(path.relative_to(here) if path.is_relative_to(here) else path) for path in sorted(opened)}
    return {name: digests.of(path) if opened[path] else ABSENT for path, name in names.items()}


def changed(recorded: dict[str, str], digests: FileDigests) -> list[str]:
    """Which of the files that digests_of has told of are others now."""
    return [
        name
        for name, digest in recorded.items()
        if (digests.of(Path(name)) if Path(name).is_file() else ABSENT) != digest
    ]
