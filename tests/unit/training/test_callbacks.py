"""A signal ends a training with a checkpoint; the line of progress."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adder.core.progress import Progress
from adder.training import checkpoints
from adder.training.stage import TrainSettings
from tiny import write_training_inputs
from training_stage import adapter_digests, run_training, small_settings, train_record

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


STOPPED = """
import json, os, signal, sys
from pathlib import Path
from adder.training import trainer
from training_stage import run_training, train_settings
at, name, values, inputs, out, checkpoints = json.loads(sys.argv[1])
signal.signal(getattr(signal, name), signal.SIG_DFL)  # under nohup a closed terminal is ignored
def stop(self, *args, **kwargs):
    if self.state.global_step >= at:
        os.kill(os.getpid(), getattr(signal, name))
    return step(self, *args, **kwargs)
step, trainer.Trainer.training_step = trainer.Trainer.training_step, stop
Path(out).mkdir()
inputs = {name: Path(path) for name, path in inputs.items()}
runtime = {"checkpoints": 3}
run_training(train_settings(**values), inputs, Path(out), checkpoints=Path(checkpoints), runtime=runtime)
"""


def stopped_at(
    step: int, signal: str, values: TrainSettings, inputs: dict[str, Path], folder: Path
) -> subprocess.CompletedProcess:
    """Train in a process that sends itself a signal when step `step` begins."""
    paths = {name: str(path) for name, path in inputs.items()}
    chosen = values.model_dump(mode="json")
    arguments = json.dumps([step, signal, chosen, paths, str(folder / "out"), str(folder / "c")])
    paths = [str(ROOT / "workflow_scripts"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", STOPPED, arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGHUP"])
def test_told_to_stop_it_writes_a_checkpoint_that_the_next_start_continues(inputs, tmp_path, signal):
    values = small_settings(epochs=20, lora_dropout=0.1)
    process = stopped_at(7, signal, values, inputs, tmp_path)
    assert process.returncode == 1 and f"told to stop ({signal}) at step 8 of" in process.stderr
    assert checkpoints.newest_whole(tmp_path / "c").name == "checkpoint-8"
    for name, options in (("out", {"checkpoints": tmp_path / "c", "runtime": {"checkpoints": 3}}), ("whole", {})):
        (tmp_path / name).mkdir(exist_ok=True)
        run_training(values, inputs, tmp_path / name, Progress.silent(), **options)
    assert train_record(tmp_path / "out")["resumed_from"] == 8
    assert adapter_digests(tmp_path / "out") == adapter_digests(tmp_path / "whole")


def test_progress_says_over_how_many_rows_the_loss_is_and_that_times_are_rough(inputs, tmp_path):
    stream = io.StringIO()
    (tmp_path / "out").mkdir()
    run_training(small_settings(eval_samples=3), inputs, tmp_path / "out", Progress("train", stream))
    shown = stream.getvalue()
    assert re.search(r"^train: step (\d+)/\1, held-out loss \d\.\d{4} over 3 rows$", shown, re.MULTILINE)
    assert re.search(r"^train: roughly \S+ seconds for \d+ steps, by the time of one pack; ", shown, re.MULTILINE)
    assert re.search(r"^train: step \d+/\d+, loss \S+, \S+ tokens/s, roughly 0 s left$", shown, re.MULTILINE)
