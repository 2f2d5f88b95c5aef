"""What a module computes is found out by trying, and what is not known is refused."""

import pytest
import torch

from adder.kernels.fused_lora import layer_probes
from adder.kernels.fused_lora.weights import CannotFuse
from fused_lora_cases import FAMILIES, family


def frozen_layer(name: str) -> torch.nn.Module:
    return family(name).requires_grad_(False).eval().model.layers[0]


@pytest.mark.parametrize(("name", "plus_one"), [("Llama", False), ("Qwen2", False), ("Gemma", True)])
def test_an_rmsnorm_is_recognised_with_the_weight_that_it_multiplies_by(name, plus_one):
    norm = frozen_layer(name).input_layernorm
    found = layer_probes.probe_rmsnorm(norm)
    assert found.module is norm and found.plus_one is plus_one


def test_norms_that_are_trained_or_others_are_refused():
    norm = frozen_layer("Llama").input_layernorm
    norm.weight.requires_grad_(True)
    for module in (norm, torch.nn.LayerNorm(8).requires_grad_(False), torch.nn.Identity()):
        with pytest.raises(CannotFuse, match="norm"):
            layer_probes.probe_rmsnorm(module)


@pytest.mark.parametrize(("name", "activation"), [("Llama", "silu"), ("Gemma", "gelu_tanh")])
def test_an_activation_is_recognised_by_its_values(name, activation):
    assert layer_probes.probe_activation(frozen_layer(name).mlp) == activation


def test_other_activations_are_refused():
    mlp = frozen_layer("Llama").mlp
    mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(CannotFuse, match="ReLU"):
        layer_probes.probe_activation(mlp)
    with pytest.raises(CannotFuse, match="act_fn"):
        layer_probes.probe_activation(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Olmo2", "Phi3", "Cohere"])
def test_layers_with_llamas_parts_are_llama_like(name):
    assert layer_probes.is_llama_like(frozen_layer(name)) is (FAMILIES[name][1] > 0)


def test_a_record_has_what_attention_was_given_and_what_the_layer_adds():
    model = family("Llama").requires_grad_(False).eval()
    hidden = layer_probes.sample_normal(1, layer_probes.PROBE_TOKENS, model.config.hidden_size)
    found = [layer_probes.record_layer(model.model.layers[0], model.model.rotary_emb, hidden) for _ in range(2)]
    assert found[0]["query"].shape == (1, 4, layer_probes.PROBE_TOKENS, 16) and found[0]["mask"] is None
    assert layer_probes.records_agree(*found, tolerance=0.0)
    assert model.config._attn_implementation == "adder_segments"


def test_records_agree_within_the_tolerance_and_not_beyond():
    x = torch.ones(4)
    a = {"x": x, "scale": 0.5}
    assert layer_probes.records_agree(a, {"x": x * 1.001, "scale": 0.5}, 0.01)
    for other in ({"x": x * 1.1, "scale": 0.5}, {"x": x, "scale": 0.6}, {"x": x}, {"x": torch.ones(5), "scale": 0.5}):
        assert not layer_probes.records_agree(a, other, 0.01)


def test_samples_leave_torchs_generator_alone():
    before = torch.random.get_rng_state()
    assert torch.equal(layer_probes.sample_normal(3, 2), layer_probes.sample_normal(3, 2))
    assert torch.equal(before, torch.random.get_rng_state())
