"""Block sizes, and who does a tensor's work."""

import types

import pytest
import torch

from adder.kernels import families, tiles, triton_utils


@pytest.mark.parametrize(("n", "minimum", "expected"), [(1, 16, 16), (16, 16, 16), (17, 16, 32), (1, 1, 1), (9, 1, 16)])
def test_blocks_are_the_next_power_of_two_from_a_minimum_on(n, minimum, expected):
    assert triton_utils.next_power_of_2(n, minimum) == expected


def test_wider_rows_get_more_warps():
    assert [triton_utils.num_warps_for(width) for width in (64, 1024, 1025, 8192, 8193)] == [4, 4, 8, 8, 16]


def test_references_do_the_work_on_a_cpu_unless_kernels_are_interpreted():
    assert triton_utils.runs_kernels(torch.zeros(1), "rope") is triton_utils.INTERPRETED


def test_references_do_the_work_of_a_family_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(triton_utils, "INTERPRETED", True)
    families.turn_off("rope", "it was slow")
    assert not triton_utils.runs_kernels(torch.zeros(1), "rope")
    assert triton_utils.runs_kernels(torch.zeros(1), "rmsnorm")
    families.forget()
    assert triton_utils.runs_kernels(torch.zeros(1), "rope")


def test_references_do_the_work_on_a_gpu_without_triton(monkeypatch):
    on_gpu = types.SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(triton_utils, "triton", None)
    monkeypatch.setattr(triton_utils, "INTERPRETED", False)
    assert not triton_utils.runs_kernels(on_gpu, "lm_head_loss")


@pytest.mark.parametrize(
    ("card", "runs"),
    [
        ("70", []),
        ("75", ["rmsnorm", "lm_head_loss"]),
        ("86", ["rmsnorm", "lm_head_loss", "dropout", "decode_attention"]),
    ],
)
def test_references_do_the_work_on_a_card_that_triton_has_nothing_for(monkeypatch, card, runs):
    """Nothing before Turing, and there no matmuls: they would not be on tensor cores."""
    on_gpu = types.SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(triton_utils, "triton", object())
    monkeypatch.setattr(triton_utils, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "card_of", lambda device: tiles.card_named(card))
    families_here = ("rmsnorm", "lm_head_loss", "dropout", "decode_attention")
    assert [family for family in families_here if triton_utils.runs_kernels(on_gpu, family)] == runs


def test_functions_stay_what_they_are_without_triton(monkeypatch):
    monkeypatch.setattr(triton_utils, "triton", None)
    assert triton_utils.jit(len) is len
