"""What earlier attempts at a stage took, so that its time covers those that were killed."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from adder.core.files import atomic_write, read_json, write_json

# A kill that can't be heard loses at most so many seconds of the account.
INTERVAL = 10.0


@contextlib.contextmanager
def counted(file: Path, start: float) -> Iterator[list[float]]:
    """Yield the seconds of each earlier attempt; keep them in `file` with those of this one, which began at `start`.

    `start`: of time.monotonic(). The file is written all along: what kills a process doesn't always let it speak. Who
    needs it no longer removes it.
    """
    earlier = _read(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    over = threading.Event()

    def keep() -> None:
        # A full disk is the stage's to tell.
        with contextlib.suppress(OSError), atomic_write(file) as partial:
            write_json(partial, [*earlier, round(time.monotonic() - start, 3)])

    def keep_on() -> None:
        keep()
        while not over.wait(INTERVAL):
            keep()

    keeper = threading.Thread(target=keep_on, daemon=True)
    keeper.start()
    try:
        yield earlier
    finally:
        over.set()
        keeper.join()
        keep()


def _read(file: Path) -> list[float]:
    try:
        return [float(seconds) for seconds in read_json(file)]
    except (OSError, ValueError, TypeError):
        return []
