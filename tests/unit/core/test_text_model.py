"""Which class a checkpoint loads by, and where its parameters lie on disk, as transformers itself loads them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from adder.core import text_model
from adder.core.errors import UserError
from adder.core.safetensors_layout import stored_tensors
from architectures import EXPERTS, SHAPE, tiny_architecture
from vision_models import VISION_MODELS, save_vision_model

# What differs between names on disk and in memory: fused experts, a prefix, Conv1D, tied heads, and none of it.
TEXT = [
    "deepseek_v4",
    "llama",
    "gpt2",
    "mixtral",
    "deepseek_v3",
    "phi3",
    "bloom",
    "mamba",
    "gemma3_text",
    "falcon",
    "opt",
]


# Its renamings would take `model.norm.weight` for another one, which from_pretrained then leaves as it is.
DEEPSEEK_V4 = {**SHAPE, **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "qk_rope_head_dim": 8, "hc_mult": 2}
DEEPSEEK_V4 |= {"n_routed_experts": 4, "n_shared_experts": 1, "index_head_dim": 8, "index_n_heads": 4, "index_topk": 16}
DEEPSEEK_V4 |= {"sliding_window": 16, "num_nextn_predict_layers": 0, "o_lora_rank": 16, "o_groups": 2}


def saved(folder, name):
    if name == "deepseek_v4":
        config = AutoConfig.for_model(name, **DEEPSEEK_V4)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        return folder
    if name in VISION_MODELS:
        return save_vision_model(folder, name)
    tiny_architecture(name).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*TEXT, *VISION_MODELS])
def test_parameters_are_found_on_disk_and_none_is_missing(tmp_path, name):
    folder = saved(tmp_path, name)
    model = text_model.load(folder, dtype=torch.bfloat16)
    stored = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    places = text_model.places_on_disk(model, folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(stored[disk], parameters[place]) for place, disk in places.items() if place in parameters)
    left = parameters.keys() - places.keys()
    assert all("expert" in place for place in left), left  # experts are joined in memory
    empty = text_model.without_weights(folder)
    assert text_model.lacking(empty, stored) == []
    towers = ("visual", "vision", "multi_modal_projector")
    assert all(any(tower in key for tower in towers) for key in text_model.unused(empty, stored))
    assert text_model.misshapen(empty, stored_tensors(folder)) is None
    gone = places[next(place for place in parameters if place.endswith("weight") and "embed" not in place)]
    assert text_model.lacking(empty, stored.keys() - {gone})


def test_tensors_without_a_place_and_of_another_shape_are_named(tmp_path):
    model = tiny_architecture("llama", num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    for changes in ({"num_hidden_layers": 2}, {"intermediate_size": 64, "num_hidden_layers": 2}):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
    stored, empty = stored_tensors(tmp_path), text_model.without_weights(tmp_path)
    assert {name.split(".")[2] for name in text_model.unused(empty, stored)} == {"2"}
    assert text_model.misshapen(empty, stored) == ("model.layers.0.mlp.down_proj.weight", (32, 64))


def test_the_layers_that_read_text_are_named(tmp_path):
    found = {}
    for name in ("llama", "gemma3", "qwen3_5", "qwen3_vl", "llama4"):
        found[name] = text_model.text_modules(text_model.without_weights(saved(tmp_path / name, name)))
    both = "model.language_model"
    # Where transformers has the text half alone, that is what is loaded.
    assert found == {"llama": "model", "gemma3": both, "qwen3_5": "model", "qwen3_vl": both, "llama4": ""}


def test_a_head_that_files_do_not_hold_is_missing(tmp_path):
    model = tiny_architecture("llama")
    LlamaModel(model.config).save_pretrained(tmp_path)
    lacking = text_model.lacking(text_model.without_weights(tmp_path), stored_tensors(tmp_path))
    assert lacking == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "a model of the type t5 is no causal language model"),
        ({"model_type": "vit"}, "a model of the type vit is no causal language model"),
        ({"model_type": "nonesuch"}, "can't read its config.json: .*nonesuch"),
    ],
)
def test_what_transformers_has_no_causal_model_for_is_one_sentence(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        text_model.without_weights(tmp_path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
