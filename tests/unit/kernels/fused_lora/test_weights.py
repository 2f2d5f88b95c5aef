"""The matrices [W | s·B] follow the parameters, and hold bitsandbytes' own values."""

import copy

import pytest
import torch

from adder.kernels.fused_lora import attach
from adder.training import base_model
from fused_lora_cases import (
    LENGTHS,
    autocast_step,
    batch_of,
    errors,
    family,
    in_nf4,
    on_gpu,
    step,
    step_loss,
    with_adapter,
    worst_error,
)
from tiny import save_tiny_model


def test_fused_weights_follow_the_optimizer():
    """Three steps of AdamW end where PEFT's own end."""
    batch = batch_of(9, 23, 14)
    plain = with_adapter(family("Llama"))
    fused = copy.deepcopy(plain)
    attach.attach(fused)
    for model in (plain, fused):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            step(model, batch)
            optimizer.step()
    found, expected = (
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} for model in (fused, plain)
    )
    assert worst_error(found, expected) < 1e-3


def test_fused_weights_follow_whatever_changes_them():
    """A state dict that is loaded, tensors that are exchanged, a scaling that is changed."""
    model, batch = with_adapter(family("Llama")), batch_of(9, 23)
    attach.attach(model)
    pairs = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def load():
        model.load_state_dict({name: p * 2 for name, p in pairs.items()}, strict=False)

    def exchange():
        for p in pairs.values():
            p.data = p.data.double().float() * 0.7

    def scale():
        model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] *= 3

    for change in (load, exchange, scale):
        before = step_loss(model, batch)
        change()
        found = step_loss(model, batch)
        assert found != pytest.approx(before, rel=1e-4)
        attach.detach(model)
        assert found == pytest.approx(step_loss(model, batch), rel=1e-5)
        attach.attach(model)


def test_nf4_weights_taken_to_fp8_one_at_a_time_compute_what_held_ones_do(tmp_path):
    """Loss and gradients to the bit, in memory of the largest group's size that all layers share."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    folder = save_tiny_model(tmp_path / "model", **shape)
    model, batch = with_adapter(in_nf4(folder)), batch_of(9, 23)
    results = {}
    for hold in (True, False):
        report = attach.attach(model, hold=hold, precision="fp8")
        assert report["fp8"] == 8 and report["held"] is hold and (report["held_bytes"] > 0) is hold
        results[hold] = step(model, batch)
    assert results[True][0] == results[False][0]
    assert worst_error(results[True][1], results[False][1]) == 0
    memories = {id(group.fp8.memory): group.fp8.memory for group in attach._groups(model)}
    assert [memory.values.numel() for memory in memories.values()] == [2 * 160 * 64]  # of gate and up
    attach.attach(model)
    exact = step(model, batch)
    assert 1e-4 < worst_error(results[False][1], exact[1]) < 0.3


@pytest.mark.parametrize("hold", [True, False])
def test_nf4_values_are_those_of_bitsandbytes(tmp_path, hold):
    folder = save_tiny_model(tmp_path / "model", hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    model, _ = base_model.load(folder, "qlora", "float32", "cpu")
    assert not base_model.four_bit_layers(model)  # on a CPU they are held dequantised already
    model = with_adapter(in_nf4(folder))
    batch = batch_of(9, 23)
    expected_loss, expected = step(model, batch)
    report = attach.attach(model, hold=hold)
    assert report["held"] is hold and report["decoder_layers"] == 2
    assert (report["held_bytes"] > 0) is hold
    found_loss, found = step(model, batch)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert worst_error(found, expected) < 2e-5


@pytest.mark.gpu
def test_nf4_on_a_gpu(tmp_path):
    """Values held or dequantised in each matmul: the same gradients to the bit, and as exact as PEFT's."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "head_dim": 64}
    folder = save_tiny_model(tmp_path / "model", **shape)
    batch = batch_of(*LENGTHS, device="cuda")
    model = with_adapter(base_model.load(folder, "qlora", "bfloat16", "cuda")[0]).cuda()
    peft = autocast_step(model, torch.bfloat16, batch)
    results = {}
    for hold in (True, False):
        report = attach.attach(model, hold=hold)
        assert report["decoder_layers"] == 2 and report["held"] is hold
        results[hold] = step(model, batch)
    assert results[True][0] == results[False][0]
    assert worst_error(results[True][1], results[False][1]) == 0
    attach.detach(model)
    base = base_model.load(folder, "qlora", "bfloat16", "cuda")[0]
    base_model.hold_dequantised(base, torch.bfloat16)
    exact_model = with_adapter(base.float()).cuda()
    exact_model.get_base_model().set_attn_implementation("sdpa")
    exact = step(exact_model, batch)
    assert errors(results[True], exact)["all"] < 1.3 * errors(peft, exact)["all"]


@pytest.mark.gpu
def test_fused_weights_follow_fused_adamw():
    """torch's fused optimizers change parameters without raising their version (2.11): each step must be seen."""
    batch = batch_of(*LENGTHS, device="cuda")
    model = on_gpu("Llama", torch.bfloat16, "adder_varlen")
    attach.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for _ in range(2):
        step(model, batch)
        optimizer.step()
        found = step(model, batch)[0]
        attach.attach(model)  # reads the parameters anew
        assert step(model, batch)[0] == found
