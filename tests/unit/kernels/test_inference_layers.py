"""Decoder layers with joined matmuls compute what the model's own do, and leave it as it was."""

import pytest
import torch

from adder.kernels.fused_lora.weights import CannotFuse
from adder.kernels.inference_layers import fuse, fused_for_inference, join_linears
from decoding_cases import make


@pytest.mark.parametrize(("family", "layers"), [("Llama", 2), ("Qwen2", 2), ("Qwen3", 2), ("Olmo2", 0), ("GPTNeoX", 0)])
def test_llama_like_layers_compute_the_same(family, layers):
    model = make(family)
    ids = torch.arange(6, 46).view(2, 20)
    expected = model(ids).logits.detach()
    with fused_for_inference(model) as count, torch.inference_mode():
        assert count == layers
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert torch.equal(model(ids).logits.detach(), expected)


def test_weights_are_joined_without_holding_them_twice():
    model = make("Qwen2")
    attention = model.base_model.layers[0].self_attn
    names = [name for name, _ in model.named_parameters()]
    with fused_for_inference(model):
        pointers = {
            attention.q_proj.weight.untyped_storage().data_ptr(),
            attention.k_proj.weight.untyped_storage().data_ptr(),
        }
        assert len(pointers) == 1
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == names


def test_a_layer_that_computes_something_else_is_left_alone():
    model = make("Llama")
    layer = model.base_model.layers[0]
    usual = type(layer)

    class Scaled(usual):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states + 0.5 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)

    layer.__class__ = Scaled
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CannotFuse, match="something else"):
        fuse(layer, model.base_model.rotary_emb)
    assert "forward" not in layer.__dict__


def test_biases_are_joined_too_and_must_be_there_for_all():
    linears = [torch.nn.Linear(8, size) for size in (4, 6)]
    x = torch.randn(3, 8)
    expected = torch.cat([linear(x) for linear in linears], -1)
    assert torch.allclose(torch.nn.functional.linear(x, *join_linears(linears)), expected)
    with pytest.raises(CannotFuse, match="only some"):
        join_linears([torch.nn.Linear(8, 4), torch.nn.Linear(8, 4, bias=False)])
