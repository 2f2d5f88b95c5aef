"""Which backend generates, and how long replies are."""

import pytest
import torch

from adder.core.errors import UserError
from adder.evaluation import generation


def test_vllm_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    assert generation.choose_backend("auto", "cuda").value == "hf"
    with pytest.raises(UserError, match="evaluate.backend: 'vllm' was asked for, but the package vllm isn't installed"):
        generation.choose_backend("vllm", "cuda")
    monkeypatch.setattr(generation, "find_spec", lambda name: name)
    assert (
        generation.choose_backend("auto", "cuda").value == "vllm"
        and generation.choose_backend("auto", "cpu").value == "hf"
    )
    assert generation.choose_backend("hf", "cuda").value == "hf"
    with pytest.raises(UserError, match="no CUDA device is used"):
        generation.choose_backend("vllm", "cpu")


def test_reply_lengths():
    new = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2], [9, 3, 2, 2]])
    lengths, ended = generation.reply_lengths(new, torch.tensor([2, 3]))
    assert lengths.tolist() == [3, 4, 1, 2] and ended.tolist() == [True, False, True, True]
    lengths, ended = generation.reply_lengths(new[:, :0], torch.tensor([2]))
    assert lengths.tolist() == [0] * 4 and not ended.any()
