"""Which stage folders no configured run needs, and how much room they take."""

import json
import os
from pathlib import Path

from adder.core.file_digests import FileDigests
from adder.workflow.stage_graph import Stage

KINDS = ("stages", "cache")


def unneeded(results: Path, needed: dict[str, Stage]) -> list[Path]:
    """Return the folders below `results` that none of the `needed` stages (by folder) stands for, sorted.

    Kept are the needed stages' folders, the cache entries behind them and, for stages that have not finished, their
    checkpoints, beside which a file has what they took; what a killed job left half-written is unneeded.
    """
    keep = {results / folder for folder in needed}
    keep |= {results / "cache" / stage.name / _fingerprint(results / folder) for folder, stage in needed.items()}
    found = [path for kind in KINDS for path in (results / kind).glob("*/*") if path.is_dir() and path not in keep]
    done = all((results / f / "stage.json").exists() for f, stage in needed.items() if stage.spec.continued)
    checkpoints = list((results / "checkpoints").glob("*"))
    return sorted(found + (checkpoints if done else []))


def freed_bytes(folders: list[Path]) -> int:
    """Return the room that removing `folders` frees: a file that has links elsewhere frees none."""
    links: dict[tuple[int, int], list[int]] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                stat = path.stat()
                entry = links.setdefault((stat.st_dev, stat.st_ino), [0, stat.st_nlink, stat.st_size])
                entry[0] += 1
    return sum(size for seen, links_in_all, size in links.values() if seen >= links_in_all)


def remove(folders: list[Path], digests: FileDigests) -> None:
    """Remove folders, each at once as far as others can see; `digests` remember what has links elsewhere."""
    for folder in folders:
        gone = folder.with_name(f".{folder.name}.{os.getpid()}.removed")
        folder.rename(gone)
        digests.remove(gone)


def _fingerprint(folder: Path) -> str:
    try:
        return json.loads((folder / "stage.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return "none"
