"""The models of a finished run, to talk to: the merged one, its base, and what both are told before a conversation."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.stage_record import StageRecord


@dataclass(frozen=True)
class RunModels:
    """Model directories, and the training's system prompt (format.system_prompt). None: not known.

    Both are asked through the tuned model's tokenizer and chat template, as in the evaluation.
    """

    tuned: Path
    base: Path | None
    system_prompt: str | None


def find(folder: Path) -> RunModels:
    """The models of a run's folder (results/<run>), or of any model directory, whose base isn't known.

    Raises UserError for a folder that is neither.
    """
    if (folder / "config.json").is_file():
        return RunModels(folder, None, None)
    if not (folder / "merged_model" / "config.json").is_file():
        runs = sorted(path.parent.parent.name for path in folder.glob("*/merged_model/config.json"))
        others = f"; the runs in it are {', '.join(runs)}" if runs else ""
        raise UserError(
            f"{folder}: has no merged_model/; name the folder of a finished run, such as results/default{others}"
        )
    return RunModels(folder / "merged_model", _base(folder), _system_prompt(folder / "run.yaml"))


def _base(run: Path) -> Path | None:
    """The model directory that the run's merge has read; None where it is no longer there."""
    stages = run.parent / "stages"
    try:
        merge: StageRecord = read_json(stages / "merge" / read_json(run / "stages.json")["merge"] / "stage.json")
        read = merge["inputs"]["model"]
        for record in sorted(stages.glob("model/*/stage.json")):
            model: StageRecord = read_json(record)
            written = {name: file["digest"] for name, file in model["outputs"].items()}
            if read.items() <= written.items():
                return record.parent / "model"
    except (OSError, ValueError, KeyError, TypeError):  # a run's folder that was copied here without its stages
        pass
    return None


def _system_prompt(path: Path) -> str | None:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))["settings"]["format.system_prompt"]["value"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None
