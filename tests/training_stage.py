"""The train stage as tests run it: its settings, its inputs, and a run in this process with one thread."""

from pathlib import Path
from typing import Any

from adder.core.files import digest_file, read_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.training import run
from adder.training.records import PreflightFigures, TrainingFacts, TrainInputs, TrainRecord, TrainSummary
from adder.training.stage import TrainSettings

# Of a sound set-up: nothing to warn of.
FIGURES: PreflightFigures = {
    "batch": {"pieces": [{"text": "Yes", "loss": 1, "example": 0}], "from": 0, "tokens": 10},
    "tokens": 10,
    "labelled": 5,
    "labelled_share": 0.5,
    "base_loss": 6.0,
    "ln_vocabulary": 6.4,
    "trainable_parameters": 1000,
    "gradient_norm": 1.0,
    "layers": 14,
    "layers_without_gradient": [],
    "untrained_tokens": [],
    "disk": {name: {"needed_bytes": 1, "free_bytes": 10} for name in ("checkpoints", "merged_model")},
    "seconds": 0.1,
    "estimated_seconds": 3,
}


def training_facts(**changes: Any) -> TrainingFacts:
    """Facts of a training by which nothing is wrong, but for `changes`; what is 0 here is not judged by."""
    neutral = {
        "ln_vocabulary": 20.0,
        "parameters": 135_000_000,
        "trainable_parameters": 10_000,
        "labelled_share": 0.5,
        "dtype": "float32",
        "examples": 0,
        "epochs": 1,
        "steps": 0,
        "steps_per_epoch": 0,
        "effective_batch": 0,
        "tokens_per_step": 0,
    }
    return TrainingFacts(**{**neutral, **changes})


def train_settings(**changes: Any) -> TrainSettings:
    """Settings of the train stage: the defaults but for `changes`, packs filled the same in each epoch.

    A learning rate that they would refuse is put in behind their back.
    """
    rate = changes.get("learning_rate", 1e-4)
    known = TrainSettings(**{"reshuffle": False, **changes, "learning_rate": min(rate, 0.5)}).model_dump(mode="json")
    # By way of JSON, as a stage is given them.
    return TrainSettings.model_validate(known).model_copy(update={"learning_rate": rate})


def train_inputs(folders: dict[str, Path]) -> TrainInputs:
    """The stage's inputs out of its parents' folders by name."""
    return TrainInputs(**{name: folders[name] for name in ("lengths", "tokenize", "model")})


def run_training(
    settings: TrainSettings,
    folders: dict[str, Path],
    out: Path,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    results: Path | None = None,
    runtime: dict[str, Any] | None = None,
) -> TrainSummary:
    """Run the stage's function; `runtime`: as in the settings, by default one process, one thread and no trackers."""
    values = {"gpus": 1, "threads": 1, "report_to": [], **(runtime or {})}
    context = Context(progress or Progress.silent(), Runtime(**values), results or out, checkpoints)
    return run.run(settings, train_inputs(folders), out, context)


def train_record(out: Path) -> TrainRecord:
    """train.json of a finished training."""
    return read_json(out / "train.json")


def small_settings(**changes: Any) -> TrainSettings:
    """Settings of a training of seconds, with two evaluations and without chance in it."""
    values = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 6, "lora_r": 4, "compute_dtype": "float32"}
    return train_settings(**{**values, "eval_samples": 4, "eval_times": 2, **changes})


def train_small(folders: dict[str, Path], out: Path, **changes: Any) -> TrainRecord:
    """Train with small_settings into a new folder; its train.json."""
    out.mkdir()
    run_training(small_settings(**changes), folders, out)
    return train_record(out)


def adapter_digests(out: Path) -> dict[str, str]:
    """Digest of each file of the adapter that a training wrote."""
    return {path.name: digest_file(path) for path in sorted((out / "adapter").iterdir())}
