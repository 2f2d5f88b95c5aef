"""The one exception that is shown to the user without a traceback, and what the system refuses in its form."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What to do about what the system refuses.
REMEDIES = {
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EPERM: "give yourself the right to it, or name another place",
    errno.EROFS: "name a place that can be written to, for results by runtime.results",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk or its connection fails; see the system's log",
    errno.ESTALE: "the file system was changed from elsewhere; start again",
    **dict.fromkeys(FULL, "make room, then the same command goes on"),
}


class UserError(Exception):
    """A mistake in the input or the settings. The message names the place, what was found, what is allowed."""


def of_system(error: OSError, file: Path | str | None = None) -> UserError | None:
    """What the system refuses about a file, or a full disk, as one sentence; None for an error that tells of neither.

    file: which it is, where the error itself doesn't say.
    """
    name = error.filename if error.filename is not None else file
    if name is None and error.errno in FULL:  # a write, which names no file
        name = "the disk"
    if name is None or error.errno is None or not error.strerror:
        return None
    shown = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    if len(shown) > 200:
        shown = f"{shown[:100]}…{shown[-60:]}"
    remedy = REMEDIES.get(error.errno)
    return UserError(f"{shown}: {error.strerror}" + (f"; {remedy}" if remedy else ""))


@contextlib.contextmanager
def system_errors_told(file: Path | str | None = None) -> Iterator[None]:
    """Turn what the system refuses inside into a UserError that names the file (`file`, where the error doesn't)."""
    try:
        yield
    except OSError as error:
        told = of_system(error, file)
        if told is None:
            raise
        raise told from error
