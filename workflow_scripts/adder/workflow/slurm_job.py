"""Inside a job of Slurm's: its time limit, and going back into the queue before it."""

import os
import re
import subprocess

# Slurm tells a job so many seconds before its limit, up to a minute earlier by its own clock.
WARNING = 120
LATEST_WARNING = WARNING + 60


def seconds_left() -> float | None:
    """Seconds that this Slurm job may still run; None outside one, without a limit, or where it is being ended."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    state, _, left = _ask("squeue", "-h", "-j", job, "-o", "%T|%L").partition("|")
    return seconds(left) if state == "RUNNING" else None


def time_is_up() -> bool:
    """Whether this job was told to stop because of its time limit, and not by somebody who ended it."""
    left = seconds_left()
    return left is not None and left <= LATEST_WARNING


def put_back() -> bool:
    """Put this job back into the queue, under its number; Slurm then ends it. False where the cluster has it not so."""
    try:
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def seconds(text: str) -> float | None:
    """Seconds of a time as Slurm writes it ("1-02:03:04", "3:04"); None for what is no time, such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
