"""The live doctor: in the real trainer, each diagnosis once, also after a kill."""

from types import SimpleNamespace

import pytest

from adder.core.files import read_jsonl
from adder.core.progress import Progress
from adder.training import trainer
from adder.training.monitoring.doctor import diagnose
from adder.training.monitoring.live import DoctorCallback
from adder.training.records import TrainingFacts
from tiny import save_tiny_model
from toy_language import chain, heldout, many, quick_settings, write_inputs
from training_stage import run_training, train_record, training_facts


class Remembered(Progress):
    """A progress that remembers what the doctor said."""

    def __init__(self):
        self.lines: list[str] = []

    def line(self, text: str, last: bool = False, left: float | None = None) -> None:
        pass

    def say(self, text: str) -> None:
        self.lines += [text] if text.startswith("doctor: ") else []

    note = say


def test_each_diagnosis_is_said_once_also_after_a_kill(tmp_path, monkeypatch):
    """Killed at step 40 and continued from its checkpoint, a training ends with the same diagnoses."""
    settings = quick_settings(learning_rate=1e-9)
    rows, held = many(chain, 240, factor=7), heldout(factor=7)
    inputs = write_inputs(tmp_path / "in", save_tiny_model(tmp_path / "base"), rows, held, 4)
    step = trainer.Trainer.training_step

    def killed_at_40(self, *args, **kwargs):
        if self.state.global_step == 40:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def start(name: str) -> list[str]:
        said = Remembered()
        (tmp_path / name).mkdir(exist_ok=True)
        folder = tmp_path / f"{name} checkpoints"
        run_training(settings, inputs, tmp_path / name, said, checkpoints=folder, runtime={"checkpoints": 4})
        return said.lines

    def judged(name: str) -> list:
        out = tmp_path / name
        curve, samples = list(read_jsonl(out / "metrics.jsonl")), list(read_jsonl(out / "samples.jsonl"))
        return diagnose(curve, samples, TrainingFacts(**train_record(out)["facts"]), settings)

    said = start("undisturbed")
    first, then = said
    assert first.startswith("doctor: learning rate far off: ") and then.startswith("doctor: loss flat: the loss is ")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "training_step", killed_at_40)
        start("killed")
    assert start("killed") == []
    assert [one["name"] for one in judged("undisturbed")] == ["loss flat"] and judged("killed") == judged("undisturbed")


def test_what_only_the_last_look_sees_is_said_too():
    """An evaluation after the last step ends in no look of the trainer's."""
    rows = [{"step": i + 1, "epoch": (i + 1) / 30, "loss": 2.0 - 0.06 * i, "grad_norm": 1.0} for i in range(30)]
    rows += [{"step": 10, "epoch": 0.3, "eval_loss": 1.0}, {"step": 30, "epoch": 1.0, "eval_loss": 1.2}]
    said = Remembered()
    doctor = DoctorCallback(training_facts(steps=30), quick_settings(), [], said)
    state = SimpleNamespace(log_history=[], max_steps=30)
    doctor.on_train_begin(None, state, None)
    for row in rows[:-1]:
        state.log_history.append(row)
        doctor.on_log(None, state, None)
    assert said.lines == []
    doctor.conclude(rows)
    assert [line.split(":")[1] for line in said.lines] == [" overfitting"]
