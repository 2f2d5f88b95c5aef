"""Weights that can't be a model's are refused by the name of the first one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adder.core import text_model
from adder.core.errors import UserError
from adder.data.checkpoints.weight_files import refuse_odd_values, refuse_repeated
from tiny import save_tiny_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", tie_word_embeddings=False)


def change(folder, **config):
    """The model's tensors, to be changed and written; and its config.json, changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return load_file(folder / "model.safetensors")


def check(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuse_odd_values(text_model.without_weights(folder), folder, "org/it", 1)


def test_usual_weights_are_taken_in_any_mixture_of_floats(folder):
    tensors = change(folder)
    check(folder, {name: tensor.float() if "norm" in name else tensor.half() for name, tensor in tensors.items()})
    refuse_repeated(folder, "org/it")


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_none_are_counted(folder, bad):
    tensors = change(folder)
    tensors[UP] = tensors[UP].half()
    tensors[UP][0, :2] = bad
    tensors["model.norm.weight"][3] = bad
    with pytest.raises(UserError, match=rf"2 of the numbers in {UP} of org/it are infinite .*, and 1 more tensors"):
        check(folder, tensors)


def test_large_numbers_whose_sum_is_not_finite_are_numbers(folder):
    tensors = change(folder)
    tensors[UP] = torch.full_like(tensors[UP], 3e38)
    check(folder, tensors)


def test_what_the_model_does_not_use_is_not_looked_at(folder):
    tensors = change(folder)
    check(folder, {**tensors, "mtp.limit": torch.tensor([float("inf")]), "mtp.count": torch.tensor([1])})


def test_weights_in_no_usual_float_are_refused(folder):
    tensors = change(folder)
    tensors[UP] = tensors[UP].double()
    with pytest.raises(UserError, match=f"stores {UP} in F64; weights must be in BF16, F16, F32"):
        check(folder, tensors)


def test_a_head_that_is_tied_and_another_one_is_refused(folder):
    tensors = change(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"a lm_head.weight other than its model.embed_tokens.weight.*tie_word_embedd"):
        check(folder, tensors)
    check(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})


def test_a_tensor_that_two_files_have_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({UP: tensors[UP]}, folder / "more.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, "model.safetensors"), "other": "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{UP} twice, in model.safetensors and in more.safetensors"):
        refuse_repeated(folder, "org/it")
