"""Which stages what people look at is made of, and how it is asked for where these are others.

People look into `results/<run>/` and at the comparison of runs. Both are made by jobs beside the stages.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from adder.core.files import atomic_write, write_json

# The stages that a run's folder is made of, where the run has them.
SHOWN = ("train", "merge", "report", "gguf")
# What a run's folder says it is made of: the stages' keys by name.
RECORD = "stages.json"
# The same of the comparison, below the results.
COMPARED = "cache/compared.json"


def request(results: Path, name: str, wanted: Mapping[str, object], record: Path) -> None:
    """Keep the request `results`/cache/requests/<name>.json, an input of the rule that makes what `record` tells of.

    It is written anew whenever the record tells of other stages than `wanted`, so that its time stamp has the rule run
    whatever Snakemake remembers of earlier runs: nothing, where .snakemake was removed or the results were moved.
    """
    file = results / "cache" / "requests" / f"{name}.json"
    is_made = _read(record) == wanted
    if is_made and file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        write_json(partial, wanted)
    if is_made:
        os.utime(file, (0, 0))


def _read(record: Path) -> object:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None
