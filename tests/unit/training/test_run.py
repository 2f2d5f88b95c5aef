"""The train stage: every method writes what it should, and its result depends on its settings alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adder.core.files import read_json, read_jsonl
from tiny import write_training_inputs
from training_stage import adapter_digests, run_training, small_settings, train_record, train_small

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_every_method_trains_and_writes_what_it_should(inputs, tmp_path, method):
    out = tmp_path / "out"
    out.mkdir()
    values = small_settings(epochs=4, learning_rate=1e-2, method=method)
    run_training(values, inputs, out)
    summary = train_record(out)
    assert summary["final_loss"] < summary["first_loss"]
    rows = list(read_jsonl(out / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, summary["steps"] + 1))
    assert all({"learning_rate", "grad_norm", "tokens_per_second"} <= row.keys() for row in rows if "loss" in row)
    assert len([row for row in rows if "eval_loss" in row]) == 2
    assert summary["effective_batch"] == {"asked": 6, "mean_examples": 6.0, "packs": 2}
    plan = read_json(out / "plan.json")
    assert "nf4_weights" not in plan  # every matrix is one of a linear layer
    assert plan["compute_dtype"]["value"] == "float32" and all(choice["reason"] for choice in plan.values())
    if method == "full":
        assert AutoModelForCausalLM.from_pretrained(out / "model").dtype == torch.bfloat16
    else:
        config = read_json(out / "adapter" / "adapter_config.json")
        assert config["target_modules"] == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        assert config["base_model_name_or_path"] == "tiny"


def test_the_same_settings_give_the_same_adapter(inputs, tmp_path):
    for name in ("one", "two"):
        train_small(inputs, tmp_path / name)
    assert adapter_digests(tmp_path / "one") == adapter_digests(tmp_path / "two")


def test_a_run_killed_ten_times_at_any_moment_ends_with_the_same_adapter(tmp_path):
    """During a step, a checkpoint write, an evaluation and the final save; tests/training_kills.py makes fifty."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "training_kills.py"), "10"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert re.search(r"^10 kills .*'step': \d.*every adapter the same", process.stdout, re.MULTILINE), process.stdout
