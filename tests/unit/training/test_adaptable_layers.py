"""Which layers get pairs: those that read text and whose weight nothing but their own product reads."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from adder.core.errors import UserError
from adder.training import adaptable_layers, lora
from architectures import ARCHITECTURES, SHAPE, tiny_architecture
from training_stage import train_settings
from vision_models import VISION_MODELS, save_vision_model

# What leads tokens to experts in these, as their classes in transformers have it.
ROUTERS = {
    "phimoe": ["router"],
    "llama4_text": ["router"],
    "qwen3_next": ["shared_expert_gate"],
    "gemma3n_text": ["modality_router", "per_layer_input_gate"],
    "zaya": ["down_proj", "fc1", "fc2", "out_proj"],
}
# Kernels of state-space models are given these weights; a pair beside them would be left out.
READ_DIRECTLY = {
    "mamba": ["x_proj", "dt_proj", "out_proj"],
    "jamba": ["dt_proj"],
    "bamba": ["out_proj"],
    "falcon_h1": ["out_proj"],
    "nemotron_h": ["out_proj"],
}


def last_parts(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_get_no_pair(name):
    model = tiny_architecture(name)
    left = {layer for layer, reason in adaptable_layers.unadaptable(model).items() if "routes" in reason}
    assert last_parts(left) == set(ROUTERS[name])
    adapted = lora.add_adapter(model, train_settings(method="lora", lora_r=4))
    assert not left & {layer for layer, _ in lora.layers(adapted)}


@pytest.mark.parametrize("name", READ_DIRECTLY)
def test_weights_that_code_reads_by_itself_get_no_pair(name):
    left = adaptable_layers.unadaptable(tiny_architecture(name))
    assert last_parts(layer for layer, reason in left.items() if "directly" in reason) == set(READ_DIRECTLY[name])


def test_layers_that_share_a_weight_get_no_pair():
    """Zamba's attention, which several layers hold: what a pair of each learnt couldn't be merged into one tensor."""
    kinds = ["mamba", "mamba", "hybrid"] * 2
    settings = {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "layers_block_type": kinds}
    settings |= {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 4}
    settings |= {"mamba_d_state": 8, "n_mamba_heads": 2, "use_mamba_kernels": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zamba", **{**SHAPE, **settings}))
    shared = {name for name, reason in adaptable_layers.unadaptable(model).items() if "shares its weight" in reason}
    assert last_parts(shared) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    adapted = {name for name, _ in lora.layers(lora.add_adapter(model, train_settings(method="lora", lora_r=4)))}
    assert adapted and not adapted & shared


def test_everywhere_else_all_linear_layers_do():
    """Falcon's, GPT-2's and Bloom's own kinds of linear layer among them."""
    for name in ARCHITECTURES.keys() - ROUTERS.keys() - READ_DIRECTLY.keys() - {"falcon_mamba", "granitemoehybrid"}:
        model = tiny_architecture(name)
        left = adaptable_layers.unadaptable(model)
        assert not left or (name == "minimax" and last_parts(left) == {"output_gate"}), (name, left)
        assert adaptable_layers.adaptable(model)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_what_does_not_read_text_gets_no_pair_and_is_not_quantised(tmp_path, name):
    model = AutoModelForImageTextToText.from_pretrained(save_vision_model(tmp_path, name), dtype=torch.float32)
    towers = {layer for layer in adaptable_layers.linear_layers(model) if "vis" in layer or "projector" in layer}
    left = adaptable_layers.unadaptable(model)
    assert towers and all(left[layer] == adaptable_layers.NO_TEXT for layer in towers)
    for wanted in ("all-linear", ["q_proj", "v_proj"]):
        fresh = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
        adapted = lora.add_adapter(fresh, train_settings(method="lora", lora_r=4, target_modules=wanted))
        found = {layer for layer, _ in lora.layers(adapted)}
        assert found and not found & towers


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("phimoe", ["q_proj", "router"], r"takes in .*router, which routes tokens to experts; leave it out"),
        ("llama4_text", ".*(q_proj|router)", "which routes tokens to experts"),
        ("mamba", ["in_proj", "out_proj"], "out_proj, which has its weight read directly by MambaMixer"),
    ],
)
def test_naming_one_of_them_is_refused(name, wanted, message):
    with pytest.raises(UserError, match=message):
        lora.add_adapter(tiny_architecture(name), train_settings(method="lora", lora_r=4, target_modules=wanted))


def test_a_pattern_that_takes_in_a_tower_is_refused(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(save_vision_model(tmp_path, "gemma3"))
    settings = train_settings(method="lora", lora_r=4, target_modules=".*q_proj")
    with pytest.raises(UserError, match=r"takes in model\.vision_tower.*isn't part of the layers that read text"):
        lora.add_adapter(model, settings)
