"""What jobs write to standard error by themselves, kept off the terminal: it would stand in the midst of its lines."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def kept_in(log: Path) -> Iterator[TextIO]:
    """Send what this process's children write to standard error into `log`; yield the terminal that was there.

    What this process itself writes to sys.stderr still gets there. Where the log can't be written to, nothing changes.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
        saved = os.dup(2)
    except OSError:
        yield sys.stderr
        return
    own = sys.stderr
    encoding = getattr(own, "encoding", None) or "utf-8"
    terminal = os.fdopen(os.dup(saved), "w", buffering=1, encoding=encoding, errors="backslashreplace")
    own.flush()
    os.dup2(file.fileno(), 2)
    file.close()
    sys.stderr = terminal
    try:
        yield terminal
    finally:
        sys.stderr = own
        os.dup2(saved, 2)
        os.close(saved)
        with contextlib.suppress(OSError):
            terminal.close()


def last_words(log: Path) -> str:
    """The last line in such a log that isn't blank."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
