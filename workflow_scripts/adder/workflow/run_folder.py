"""Which stages what people look at is made of, and how it is asked for where these are others.

People look into `results/<run>/` and at the comparison of runs. Both are made by jobs beside the stages.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from adder.core.errors import UserError
from adder.core.files import atomic_write, digest_file, read_json, write_json

PAGES = ("report.html", "card.md", "metrics.json", "run.yaml")
# The stages that a run's folder is made of, where the run has them.
SHOWN = ("train", "merge", "report", "gguf")
# What a run's folder says it is made of: the stages' keys by name.
RECORD = "stages.json"
# Sizes and digests of what is in it, for whoever receives it.
FILES = "files.json"
# The stages' keys that the comparison is of, below the results.
COMPARED = "cache/compared.json"


def request(results: Path, name: str, wanted: Mapping[str, object], record: Path) -> None:
    """Keep the request `results`/cache/requests/<name>.json, an input of the rule that makes what `record` tells of.

    It is written anew whenever the record tells of other stages than `wanted`, so that its time stamp has the rule run
    whatever Snakemake remembers of earlier runs: nothing, where .snakemake was removed or the results were moved.
    """
    file = results / "cache" / "requests" / f"{name}.json"
    is_made = _read(record) == wanted
    if is_made and _read(file) == wanted:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        write_json(partial, wanted)
        if is_made:  # what another configuration's dry run asked for isn't asked for any more
            os.utime(partial, (0, 0))


def file_digests(folder: Path) -> dict[str, str]:
    """Digest (BLAKE2b, 40 hex digits) of each file that a run's folder was filled with, by its path there.

    What is written later, such as guard.json and pushed.json, is none of these.
    """
    own = [folder / name for name in PAGES] + [folder / "model.gguf"]
    own += [path for part in ("merged_model", "adapter") for path in sorted((folder / part).rglob("*"))]
    return {str(path.relative_to(folder)): digest_file(path) for path in own if path.is_file()}


def verify(folder: Path) -> list[str]:
    """Hold a run's folder against its record; return a sentence for each file that differs, is missing or was added.

    Raises UserError where there is no record.
    """
    if not (folder / FILES).is_file():
        raise UserError(f"{folder}: has no {FILES}, which says what is in it; name a run's folder, results/<run>")
    recorded, found = read_json(folder / FILES), file_digests(folder)
    return [
        *(f"{name}: missing" for name in recorded.keys() - found.keys()),
        *(f"{name}: not in the record" for name in found.keys() - recorded.keys()),
        *(f"{name}: other content" for name in found.keys() & recorded.keys() if found[name] != recorded[name]),
    ]


def _read(record: Path) -> object:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None
