"""Trained tensors find their places in the base's files, and are refused where they have none."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adder.core.errors import UserError
from adder.merging.trained_tensors import trained_tensors
from tiny import save_tiny_model
from vision_models import save_vision_model


def test_a_text_model_is_put_under_the_names_of_the_checkpoint_that_sees(tmp_path):
    base = save_vision_model(tmp_path / "base", "qwen3_5")
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "trained").mkdir()
    text = {n.replace("model.language_model.", "model."): t for n, t in tensors.items() if "visual" not in n}
    save_file(text, tmp_path / "trained" / "model.safetensors", {"format": "pt"})
    (tmp_path / "trained" / "config.json").write_bytes((base / "config.json").read_bytes())
    found = trained_tensors(tmp_path / "trained", base)
    assert found.keys() == {name for name in tensors if "visual" not in name}
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    rows = found[name].apply(torch.zeros(3, *tensors[name].shape[1:]), 5)
    assert torch.equal(rows, tensors[name][5:8].float())


def test_a_head_that_the_base_stores_beside_its_embedding_gets_the_trained_embedding(tmp_path):
    base, trained = save_tiny_model(tmp_path / "base"), save_tiny_model(tmp_path / "trained", seed=3)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    found = trained_tensors(trained, base)
    assert found["lm_head.weight"].name == "model.embed_tokens.weight"


def test_what_has_no_place_or_another_shape_is_refused(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    for change, message in (
        ({"num_hidden_layers": 3}, "has no place for model.layers.2"),
        ({"intermediate_size": 96}, "is"),
    ):
        trained = save_tiny_model(tmp_path / message.replace(" ", "-"), **change)
        with pytest.raises(UserError, match=message):
            trained_tensors(trained, base)
