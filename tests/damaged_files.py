"""A file that is another than its stage wrote."""

import os
from pathlib import Path

DAMAGES = ["written to", "time stamp put back", "truncated", "removed"]


def never(file: Path) -> str:
    """Instead of what reads a file."""
    raise AssertionError(f"{file} was read again")


def damage(file: Path, how: str) -> None:
    """One of DAMAGES, to a file that says "row"."""
    stat = file.stat()
    if how == "removed":
        file.unlink()
    else:
        file.write_text("ro" if how == "truncated" else "rov\n")
    if how == "time stamp put back":
        os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
