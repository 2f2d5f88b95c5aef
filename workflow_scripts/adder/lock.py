"""Only one workflow writes to the results at a time.

Snakemake's own lock outlives a killed Snakemake and must be removed by hand (profiles/default turns it off); this one
is the kernel's, which drops it when its holder dies.
"""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from adder.errors import UserError


def take(results: Path) -> TextIO:
    """Lock `results`/.lock and write this process into it; the lock holds for as long as the returned file is open.

    Raises UserError, which names the process that has it.
    """
    results.mkdir(parents=True, exist_ok=True)
    file = open(results / ".lock", "a+")  # not "w": until it is ours, what is in it is the other's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip()
        file.close()
        raise UserError(
            f"another Snakemake{f' ({who})' if who else ''} is writing to {results}/; wait for it, or end it"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
