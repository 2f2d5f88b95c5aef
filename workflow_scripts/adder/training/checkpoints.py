"""Checkpoints that are whole: each is sealed with the digests of its files once everything is written."""

import shutil
from pathlib import Path

from adder.core.files import digest_file, read_json, write_json

SEAL = "seal.json"


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, by the digests of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    digests = {str(path.relative_to(checkpoint)): digest_file(path) for path in files}
    partial = checkpoint / f".{SEAL}"
    write_json(partial, digests)
    partial.replace(checkpoint / SEAL)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and every file is as it was then."""
    if not (checkpoint / SEAL).exists():
        return False
    digests = read_json(checkpoint / SEAL)
    return all((checkpoint / name).is_file() and digest_file(checkpoint / name) == d for name, d in digests.items())


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole `checkpoint-N` in `folder`, removing newer ones that are not whole."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None
