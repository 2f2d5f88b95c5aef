"""One start of a training: what it refuses, what it says of a base that NF4 can't hold, and its plan."""

import io
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.training import fit
from adder.training.monitoring.preflight_warnings import warnings
from tiny import save_tiny_model, write_training_inputs
from training_stage import run_training, small_settings, train_settings, train_small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


def test_qlora_says_once_that_experts_in_one_tensor_stay_unquantised(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 512}
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    MixtralForCausalLM(MixtralConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    mixture, stream = write_training_inputs(tmp_path / "inputs", folder), io.StringIO()
    for method in ("qlora", "lora"):
        (tmp_path / method).mkdir()
        run_training(small_settings(method=method), mixture, tmp_path / method, Progress("train", stream))
    # Of a layer 12,288 numbers in the attention's matrices, 256 in the router's and 73,728 in the experts'.
    told = "of the numbers in the layers' matrices 86% stay in float32 (0.000592 GB, 8 times what NF4 would take): "
    assert stream.getvalue().count(f"train: warning: train.method: qlora, but {told}") == 1
    plan = read_json(tmp_path / "qlora" / "plan.json")
    assert plan["nf4_weights"]["value"] == "14% of the matrices" and told in plan["nf4_weights"]["reason"]
    assert any(told in line for line in warnings(read_json(tmp_path / "qlora" / "train.json")["preflight"], plan))
    assert "nf4_weights" not in read_json(tmp_path / "lora" / "plan.json")


def test_target_modules_that_fit_nothing_are_refused(inputs, tmp_path):
    with pytest.raises(UserError, match=r"train.target_modules.*nothing_here.*called down_proj, gate_proj"):
        train_small(inputs, tmp_path / "out", target_modules=["nothing_here"])


def test_a_base_whose_loss_is_no_number_is_not_trained(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    broken = write_training_inputs(tmp_path / "inputs", folder)
    with pytest.raises(UserError, match="preflight: the loss of the untrained model on the first pack is nan"):
        train_small(broken, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "purpose", "training"),
    [
        ({}, "lora", {"rank": 16, "dropout": 0.05, "four_bit": True, "fp8": True}),
        ({"method": "lora", "frozen_products": "bf16", "lora_r": 8}, "lora", {"rank": 8, "four_bit": False}),
        ({"method": "full"}, "full", {"rank": 0, "dropout": 0.0, "four_bit": False, "fp8": False}),
    ],
)
def test_kernels_are_tried_with_what_is_trained(monkeypatch, tmp_path, tiny_model_dir, changes, purpose, training):
    """With the model's own sizes, and before it is loaded; on a CPU there is nothing to try."""
    asked = []

    def decide(*arguments):
        asked.append(arguments)
        return Choice("all", "each was tried")

    monkeypatch.setattr(fit.trials, "decide", decide)
    monkeypatch.setattr(fit.torch.cuda, "current_device", lambda: 0)
    settings, progress = train_settings(**changes), Progress.silent()
    job = SimpleNamespace(settings=settings, device="cuda", results=tmp_path)
    assert fit._try_kernels(job, tiny_model_dir, "bfloat16", False, progress).value == "all"
    ((found, sizes, device, folder, _),) = asked
    assert (found, device, folder) == (purpose, "cuda:0", tmp_path / "kernel_trials")
    assert (sizes.hidden, sizes.dtype) == (AutoConfig.from_pretrained(tiny_model_dir).hidden_size, "bfloat16")
    assert {name: getattr(sizes, name) for name in training} == training
    job.device = "cpu"
    assert fit._try_kernels(job, tiny_model_dir, "float32", False, progress) is None


def test_the_plan_says_what_computes(inputs, tmp_path):
    train_small(inputs, tmp_path / "out")
    plan = read_json(tmp_path / "out" / "plan.json")
    assert plan["machine"]["value"] == "CPU" and plan["machine"]["reason"].startswith("the CPU computes, in ")
    assert "kernels" not in plan


def test_a_cpu_adds_lora_within_the_base_s_matmul_in_bf16_and_has_no_fp8(inputs, tmp_path):
    train_small(inputs, tmp_path / "out", compute_dtype="bfloat16", lora_dropout=0)
    plan = read_json(tmp_path / "out" / "plan.json")
    assert plan["lora_products"]["value"] == "folded" and plan["frozen_products"]["value"] == "bfloat16"
    assert plan["nf4_values"]["value"] == "dequantised once"
    with pytest.raises(UserError, match=r"train\.frozen_products: 'fp8' needs a GPU"):
        train_small(inputs, tmp_path / "fp8", frozen_products="fp8")
