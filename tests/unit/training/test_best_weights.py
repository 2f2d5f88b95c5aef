"""The best weights are those that leave the training, and it ends where none better come."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adder.core.files import read_jsonl
from adder.kernels import labelled_loss
from adder.training.packed_dataset import heldout_examples
from gradient_cases import collate
from tiny import write_training_inputs
from training_stage import train_small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


def too_fast(inputs: dict[str, Path], folder: Path, **changes) -> dict:
    """A rate at which the held-out rows soon get worse and worse."""
    values = {"epochs": 6, "learning_rate": 0.3, "lr_scheduler": "constant", "eval_times": 9, "samples": 0}
    return train_small(inputs, folder, **{**values, **changes})


def eval_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row}


def test_the_best_adapter_is_kept_when_asked_for(inputs, tmp_path):
    last, best = (too_fast(inputs, tmp_path / keep, keep=keep) for keep in ("last", "best"))
    losses = eval_losses(tmp_path / "best")
    wanted = min(losses, key=lambda step: (losses[step], step))
    assert losses == eval_losses(tmp_path / "last") and wanted != max(losses)
    assert (last["kept"]["value"], best["kept"]["value"]) == (max(losses), wanted)
    assert f"the best by loss was step {wanted}" in last["kept"]["reason"]
    # The weights that were kept are those that gave the loss: the run that ends there is the same up to then.
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model", dtype=torch.float32)
    found = {}
    for keep in ("last", "best"):
        adapted = PeftModel.from_pretrained(model, tmp_path / keep / "adapter")
        packs = heldout_examples(inputs["tokenize"] / "heldout.arrow", 4)
        with torch.no_grad():
            parts = [labelled_loss.labelled_losses(adapted.get_base_model(), **collate([row])) for row in packs]
        found[keep] = float(torch.cat(parts).mean())
        model = adapted.unload()
    # LoRA on the fp32 base instead of NF4, so only about the same.
    assert found["best"] < found["last"] and found["best"] == pytest.approx(losses[wanted], abs=0.1)


def test_a_training_that_gets_no_better_is_stopped(inputs, tmp_path):
    summary = too_fast(inputs, tmp_path / "out", early_stopping=2, keep="best")
    losses = eval_losses(tmp_path / "out")
    best = min(losses, key=lambda step: (losses[step], step))
    steps = sorted(losses)
    assert summary["steps"] == steps[steps.index(best) + 2] < summary["planned_steps"]
    assert (
        summary["kept"]["value"] == best and "stopped early, 2 evaluations after the best" in summary["kept"]["reason"]
    )
