"""What the autograd functions compute: dropout of LoRA's input alone; in fp8 the same whichever kernel adds LoRA."""

import copy

import pytest
import torch

from adder.kernels import fp8
from adder.kernels.fused_lora import attach, autograd_functions
from adder.kernels.rope import apply_rope
from fp8_cases import SHAPE
from fused_lora_cases import (
    LENGTHS,
    autocast_step,
    batch_of,
    errors,
    family,
    masked_reference,
    on_gpu,
    step,
    with_adapter,
    worst_error,
)


def test_dropout_drops_the_adapters_input_alone():
    p = 0.25
    model = with_adapter(family("Llama"), lora_dropout=p).train()
    reference = masked_reference(copy.deepcopy(model), p, 7)
    expected = step(reference, batch_of(9, 23, 14))
    attach.attach(model)
    torch.manual_seed(7)
    found = step(model, batch_of(9, 23, 14))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert worst_error(found[1], expected[1]) < 2e-5


def test_lora_itself_is_not_in_fp8():
    """With W = 0 there is nothing for fp8 to round: outputs and gradients stay what they were (to fp32 rounding)."""
    model = with_adapter(family("Llama", **SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.zero_()
    batch = batch_of(9, 23)
    expected_loss, expected = step(model, batch)
    attach.attach(model, precision="fp8")
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert worst_error(found, expected) < 1e-4


def launches_of_lora_swiglu_fp8(monkeypatch) -> list:
    """A list that grows by one with each forward pass of an MLP that lora_swiglu_fp8 makes."""
    calls, run = [], autograd_functions.lora_swiglu_fp8
    monkeypatch.setattr(autograd_functions, "lora_swiglu_fp8", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize(
    "modules",
    [["gate_proj", "up_proj", "down_proj"], ["gate_proj", "down_proj"], ["up_proj"], ["q_proj"]],
    ids=["all", "gate and down", "up", "none"],
)
def test_an_mlp_with_deferred_lora_is_the_same(modules, monkeypatch):
    """To fp32 rounding, and what that moves across a boundary of fp8's."""
    model = with_adapter(family("Llama", **SHAPE, mlp_bias=True), target_modules=modules)
    attach.attach(model, precision="fp8")
    batch, calls = batch_of(9, 23), launches_of_lora_swiglu_fp8(monkeypatch)
    found = step(model, batch)
    assert len(calls) == 2
    monkeypatch.setattr(autograd_functions, "MAX_FUSED_RANK", -1)
    expected = step(model, batch)
    assert len(calls) == 2
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and worst_error(found[1], expected[1]) < 5e-3


@pytest.mark.parametrize("changes", [{"rank_pattern": {"down_proj": 65}}, {"lora_dropout": 0.3}])
def test_an_mlp_beyond_the_kernel_takes_several(changes, monkeypatch):
    model = with_adapter(family("Llama", **SHAPE), **changes).train()
    attach.attach(model, precision="fp8")
    calls = launches_of_lora_swiglu_fp8(monkeypatch)
    step(model, batch_of(9, 23))
    assert not calls
    model.eval()
    step(model, batch_of(9, 23))
    assert bool(calls) == ("lora_dropout" in changes)


@pytest.mark.parametrize(("name", "launches"), [("Qwen2", 2), ("SmolLM3", 1), ("Qwen3", 0)])
def test_queries_and_keys_rotated_by_the_launch_that_adds_lora_are_the_same(name, launches, monkeypatch):
    """Which is left out where a layer has no rotation, or a norm before it."""
    model = with_adapter(family(name, **SHAPE), target_modules=["q_proj", "v_proj"])
    attach.attach(model, precision="fp8")
    batch, calls = batch_of(9, 23), []
    found = step(model, batch)

    def in_two(y, low_rank, b, bias, cos, sin, size, rotated_heads):
        calls.append(1)
        fp8.add_lora(y, low_rank, b, None, bias)
        heads = y.unflatten(1, (-1, size))[:, :rotated_heads]
        apply_rope(heads, cos, sin)

    monkeypatch.setattr(autograd_functions, "add_lora_and_rope", in_two)
    expected = step(model, batch)
    assert len(calls) == launches
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and worst_error(found[1], expected[1]) < 5e-3


def test_gradients_are_quantised_where_they_are_written(monkeypatch):
    """All but the last layer's, which comes from elsewhere, and (without kernels) those of gate and up."""
    model = with_adapter(family("Llama", **SHAPE))
    attach.attach(model, precision="fp8")
    loss, widths, quantise = model(**batch_of(9, 23)).loss, [], fp8.quantise
    monkeypatch.setattr(fp8, "quantise", lambda x: widths.append(x.shape[-1]) or quantise(x))
    loss.backward()
    config = model.config
    assert widths == [config.hidden_size] + config.num_hidden_layers * [2 * config.intermediate_size]


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_the_references():
    p, batch = 0.25, batch_of(*LENGTHS, device="cuda")
    dropout = {"lora_dropout": p}
    exact = step(masked_reference(on_gpu("Llama", torch.float32, "sdpa", dropout).train(), p, 7), batch)
    peft = masked_reference(on_gpu("Llama", torch.bfloat16, "adder_varlen", dropout).train(), p, 7)
    peft = errors(autocast_step(peft, torch.bfloat16, batch), exact)
    model = on_gpu("Llama", torch.bfloat16, "adder_varlen", dropout).train()
    attach.attach(model)
    torch.manual_seed(7)
    found = errors(autocast_step(model, torch.bfloat16, batch), exact)
    for part in peft.keys() - {"loss"}:
        assert found[part] < 1.3 * peft[part], (part, found[part], peft[part])
