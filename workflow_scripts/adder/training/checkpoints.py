"""Checkpoints that are whole: each is sealed with the digests of its files once everything is written."""

import shutil
from pathlib import Path

from adder.core.files import atomic_write, digest_file, read_json, write_json

SEAL = "seal.json"
PREFIX = "checkpoint-"


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, by the digests of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    digests = {str(path.relative_to(checkpoint)): digest_file(path) for path in files}
    with atomic_write(checkpoint / SEAL) as partial:
        write_json(partial, digests)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and every file is as it was then."""
    if not (checkpoint / SEAL).exists():
        return False
    digests: dict[str, str] = read_json(checkpoint / SEAL)
    return all((checkpoint / name).is_file() and digest_file(checkpoint / name) == d for name, d in digests.items())


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done at a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole `checkpoint-N` in `folder`, removing newer ones that are not whole."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None
