"""Training in fp16, as on a T4, on a CPU: the gradient scaler's skipped steps are counted, and outlive a kill.

accelerate gives no scaler to a CPU, so torch's own for CPUs is put where it gives a GPU one.
"""

import math

import pytest
import torch

from adder.core.files import read_json, read_jsonl
from adder.kernels.fused_lora import attach
from adder.training import trainer
from adder.training.monitoring.doctor import diagnose
from adder.training.records import TrainingFacts
from fused_lora_cases import batch_of, family, step, with_adapter, worst_error
from tiny import save_tiny_model, write_training_inputs
from training_stage import run_training, train_settings

# Scales that overflow a few times at first, and grow again soon: a start that forgot its scale would skip other steps.
SCALER = {"init_scale": 2.0**40, "growth_interval": 3, "backoff_factor": 2.0**-8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp16")
    return write_training_inputs(folder / "inputs", save_tiny_model(folder / "model"))


@pytest.fixture
def scaled(monkeypatch):
    """Trainings in fp16 get a scaler."""
    make = trainer.Trainer.__init__

    def with_scaler(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.args.fp16:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", **SCALER)

    monkeypatch.setattr(trainer.Trainer, "__init__", with_scaler)


def settings(**changes):
    own = {"method": "lora", "epochs": 3, "eval_times": 2, "samples": 0, "lora_dropout": 0.0, "learning_rate": 5e-3}
    return train_settings(**own | changes)


def test_skipped_steps_are_counted_and_the_loss_falls_as_in_fp32(scaled, inputs, tmp_path):
    curves = {}
    for dtype in ("float16", "float32"):
        (tmp_path / dtype).mkdir()
        run_training(settings(compute_dtype=dtype), inputs, tmp_path / dtype)
        curves[dtype] = [row for row in read_jsonl(tmp_path / dtype / "metrics.jsonl") if "loss" in row]
    skipped = [row["step"] for row in curves["float16"] if row.get("skipped_step")]
    assert skipped[:2] == [1, 2] and len(skipped) < len(curves["float16"]) / 2
    assert all(math.isfinite(row["loss"]) for row in curves["float16"])
    assert not any(row.get("skipped_step") for row in curves["float32"])
    first, last = curves["float32"][0]["loss"], curves["float32"][-1]["loss"]
    assert curves["float16"][0]["loss"] == pytest.approx(first, rel=0.01)
    learnt, learnt_in_half = first - last, first - curves["float16"][-1]["loss"]
    assert learnt > 0 and 0.2 * learnt < learnt_in_half < 1.3 * learnt  # in fewer steps


def test_the_doctor_explains_steps_that_are_skipped_too_often(scaled, inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(SCALER, "backoff_factor", 0.99)
    run_training(settings(compute_dtype="float16", epochs=8), inputs, tmp_path)
    curve = list(read_jsonl(tmp_path / "metrics.jsonl"))
    facts = TrainingFacts(**read_json(tmp_path / "train.json")["facts"])
    found = diagnose(curve, [], facts, settings())
    (one,) = [one for one in found if one["name"] == "gradient overflow"]
    assert "which were skipped" in one["evidence"] and "the scaler finds no scale that fits" in one["cause"]


def test_a_killed_run_goes_on_with_the_scale_that_it_had(scaled, inputs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    one = trainer.Trainer.training_step

    def die_late(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Killed
        return one(self, *args, **kwargs)

    values = settings(compute_dtype="float16")
    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    run_training(values, inputs, tmp_path / "whole")
    options = {"checkpoints": tmp_path / "checkpoints", "runtime": {"checkpoints": 3}}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Trainer, "training_step", die_late)
        run_training(values, inputs, tmp_path / "out", **options)
    run_training(values, inputs, tmp_path / "out", **options)
    assert read_json(tmp_path / "out" / "train.json")["resumed_from"]
    assert skips(tmp_path / "out") == skips(tmp_path / "whole")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def skips(folder) -> list[int]:
    return [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if row.get("skipped_step")]


def test_folded_lora_computes_in_fp16_what_it_does_in_fp32():
    """By torch's own matmuls and the kernels' references, as on a card whose kernels aren't used."""
    batch = batch_of(9, 23, 14)
    exact = step(with_adapter(family("Llama")), batch)
    model = with_adapter(family("Llama", torch.float16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    attach.attach(model)
    loss, gradients = step(model, batch)
    assert loss == pytest.approx(exact[0], rel=0.01) and worst_error(gradients, exact[1]) < 0.05
