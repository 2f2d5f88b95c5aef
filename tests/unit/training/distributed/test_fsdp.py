"""Weights in shards: when they are, and what is put together again."""

import pytest
import torch
from safetensors.torch import load_file

from adder.core import hardware
from adder.core.errors import UserError
from adder.training.distributed import fsdp
from training_stage import train_settings


@pytest.mark.parametrize(("method", "of_linear", "of_rest"), [("full", 16, 16), ("lora", 2, 2), ("qlora", 33 / 64, 2)])
def test_a_model_that_fills_a_gpu_goes_into_shards(tiny_model_dir, monkeypatch, method, of_linear, of_rest):
    """80 % of a GPU are for the bytes of the weights and their training."""
    weights = load_file(tiny_model_dir / "model.safetensors")
    linear = sum(weight.numel() for name, weight in weights.items() if "_proj" in name)
    assert linear == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    needed = of_linear * linear + of_rest * (sum(weight.numel() for weight in weights.values()) - linear)
    for room, how in ((0.99, "fsdp"), (1.01, "ddp")):
        monkeypatch.setattr(hardware, "total_memory", lambda _, room=room: room * needed / 0.8)
        assert fsdp.choose_sharding("auto", train_settings(method=method), tiny_model_dir, "cuda").value == how
    monkeypatch.setattr(hardware, "total_memory", lambda _: needed)
    with pytest.raises(UserError, match="more than .* of one GPU.* doesn't go with train.init_lora_weights: eva"):
        fsdp.choose_sharding("auto", train_settings(method=method, init_lora_weights="eva"), tiny_model_dir, "cuda")


def test_what_is_set_is_taken(tiny_model_dir):
    choice = fsdp.choose_sharding("fsdp", train_settings(), tiny_model_dir, "cuda")
    assert (choice.value, choice.reason) == ("fsdp", "as set by runtime.sharding")


def test_a_model_in_one_piece_stays_what_it_is():
    model = torch.nn.Linear(3, 2)
    assert not fsdp.is_sharded(model) and not fsdp.trains_shards(model)
    state = {"weights": [model.weight, 1.5]}
    assert fsdp.full_tensors(state)["weights"][0] is model.weight
