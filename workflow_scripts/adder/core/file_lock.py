"""One process at a time: one workflow writes to the results, one job works on a stage, one fetches a file.

The locks are the kernel's, which drops them when their holder dies. (Snakemake's own lock outlives a killed Snakemake
and must be removed by hand; profiles/default turns it off.) In a locked file stands who has it.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from adder.core.errors import UserError

# What file systems answer that have no locks, as some of clusters' do: there nobody can be kept out.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def take(folder: Path, name: str) -> TextIO:
    """Lock `folder`/.lock for as long as the returned file is open. `name` is what this process is to others.

    Raises UserError, which names the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not "w": until it is ours, what is in it is the other's. It stays open for as long as the lock is held.
    file = open(folder / ".lock", "a+")  # noqa: SIM115
    if not _lock(file):
        who = _holder(file)
        file.close()
        raise UserError(f"{who} is writing to {folder}/; wait for it, or end it")
    _sign(file, name)
    return file


@contextlib.contextmanager
def held(path: Path, busy: Callable[[str], object]) -> Iterator[bool]:
    """Have the file `path` locked, waiting for whoever has it; yield whether another had it. The file is gone after.

    `busy` is called with who has it, once, before waiting; it may raise instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with open(path, "a+") as file:
            if not _lock(file):
                if not waited:
                    busy(_holder(file))
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            # Only its holder removes the file, so what is still there is locked by nobody else.
            if not _is_at(file, path):
                waited = True
                continue
            _sign(file, "another process")
            try:
                yield waited
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _sign(file: TextIO, name: str) -> None:
    file.truncate(0)
    file.write(f"{name} (process {os.getpid()} on {socket.gethostname()})\n")
    file.flush()


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
