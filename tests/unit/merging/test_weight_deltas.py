"""What an adapter changes is read as PEFT computes it, and nothing else is taken for it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from adder.core.errors import UserError
from adder.merging.weight_deltas import BiasDelta, LoraDelta, Replacement, read_adapter, share_tied
from merge_fixture import make_adapter

TIED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("dora", [False, True])
def test_weights_stored_the_other_way_round(tmp_path, dora):
    """GPT-2 stores (in, out): DoRA's lengths go by outputs all the same."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config)
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": dora}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    delta = read_adapter(tmp_path)["transformer.h.0.attn.c_attn.weight"]
    expected = adapted.merge_and_unload().state_dict()["transformer.h.0.attn.c_attn.weight"]
    assert torch.allclose(delta.apply(weight), expected, atol=1e-6) and not torch.allclose(weight, expected, atol=0.05)


def test_a_dora_adapter_without_its_lengths_is_refused(tmp_path, tiny_model_dir):
    make_adapter(tiny_model_dir, tmp_path, use_dora=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj lacks a part of its LoRA pair: magnitude"):
        read_adapter(path.parent)


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    adapted = get_peft_model(
        torch.nn.ModuleDict({"gate": torch.nn.Linear(16, 3)}), LoraConfig(r=2, target_modules=["gate"])
    )
    adapted.base_model.model["gate"].lora_B["default"].weight.data[1] = float("nan")
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gate.lora_B.weight holds numbers that aren't finite"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_by_themselves_are_those_of_all(transposed):
    torch.manual_seed(0)
    weight, delta = torch.randn(7, 5), LoraDelta(torch.randn(2, 5), torch.randn(7, 2), 0.5, False, torch.rand(7))
    if transposed:
        weight, delta = weight.T.contiguous(), LoraDelta(delta.a, delta.b, 0.5, True)
    changed = delta.apply(weight)
    assert delta.shape == tuple(weight.shape) and delta.by_rows
    assert torch.allclose(delta.apply(weight[3:5], 3), changed[3:5], atol=1e-6)


def test_tensors_are_replaced_and_biases_added():
    weight, value = torch.ones(4, 2), torch.arange(8.0).view(4, 2)
    assert torch.equal(Replacement(value.bfloat16()).apply(weight[1:3], 1), value[1:3])
    assert torch.equal(BiasDelta(value[:, 0]).apply(weight[2:, 0], 2), value[2:, 0] + 1)


def test_of_a_tied_pair_the_stored_one_stays(tmp_path):
    value = torch.arange(6.0).view(3, 2)
    deltas = {name: Replacement(value) for name in TIED} | {"norm.weight": Replacement(torch.ones(2))}
    assert share_tied(deltas, {TIED[0], "norm.weight"}, tmp_path).keys() == {TIED[0], "norm.weight"}
    with pytest.raises(UserError, match="lm_head.weight alone"):
        share_tied({TIED[1]: Replacement(value)}, {TIED[0]}, tmp_path)
    with pytest.raises(UserError, match="in different values"):
        share_tied(deltas | {TIED[1]: Replacement(value + 1)}, {TIED[0]}, tmp_path)


def test_an_empty_adapter_is_refused(tmp_path, tiny_model_dir):
    make_adapter(tiny_model_dir, tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the adapter is empty"):
        read_adapter(tmp_path)
