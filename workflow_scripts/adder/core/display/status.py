"""What a running job says of itself, in a small file beside its log: for whoever shows it, on this machine or another.

The job may run anywhere that has the results' file system, so that a file is the one way that always works.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from adder.core.files import atomic_write

# Bytes of a status, so that there is room for the last one on a full disk.
ROOM = 4096
# Set where the terminal is Snakemake's logger plugin's: jobs then leave it alone.
SHOWN_BY_PLUGIN = "ADDER_TERMINAL"


@dataclass
class StageStatus:
    """What a job says.

    began: when the job did, by the clock; 0 where it hasn't. text: its latest line of progress. left: seconds that it
    says it still needs, at the time `at`. notices: warnings, advice and notes. error: why it ended.
    """

    began: float = 0.0
    text: str = ""
    left: float | None = None
    at: float = 0.0
    notices: list[str] = field(default_factory=list)
    error: str | None = None


def status_file(log: Path) -> Path:
    """Where the job with this log keeps its status."""
    return log.with_suffix(".status.json")


def write_status(file: Path, status: StageStatus) -> None:
    """Write the status; a place that can't be written to is no reason to end anything.

    A full disk is: there it goes into the room that an earlier one has taken.
    """
    text = _written(status)
    try:
        with atomic_write(file) as partial:
            partial.write_bytes(text)
    except OSError:
        with contextlib.suppress(OSError), file.open("r+b") as taken:
            room = file.stat().st_size
            short = StageStatus(
                began=status.began, text=status.text[:300], at=status.at, error=(status.error or "")[:1000] or None
            )
            taken.write((text if len(text) <= room else _written(short))[:room].ljust(room))


def _written(status: StageStatus) -> bytes:
    return json.dumps(asdict(status)).encode().ljust(ROOM)


def read_status(file: Path) -> StageStatus:
    """The status in a file; an empty one where there is none."""
    try:
        return StageStatus(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return StageStatus()


def is_shown_by_plugin() -> bool:
    """Whether this process was started by a Snakemake whose logger plugin has the terminal."""
    return bool(os.environ.get(SHOWN_BY_PLUGIN))
