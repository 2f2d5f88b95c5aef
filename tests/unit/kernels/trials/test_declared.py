"""Where families can be used."""

import types
from dataclasses import replace

import pytest
import torch

from adder.kernels import packed_attention
from adder.kernels.trials import declared
from kernel_families import SHAPES

LARGE = replace(SHAPES, dtype="bfloat16", head_size=64)


def lacking(name: str, **changes) -> str | None:
    return declared.FAMILIES[name].lacks(replace(LARGE, **changes))


@pytest.fixture
def card(monkeypatch):
    """A card with Triton and a capability."""

    def have(capability):
        for module in (declared, packed_attention):
            monkeypatch.setattr(module, "triton", types.SimpleNamespace())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return have


def test_each_purpose_names_families_that_are_declared():
    assert {one.name for purpose in ("lora", "full", "inference") for one in declared.families(purpose)} == set(
        declared.FAMILIES
    )
    assert all(one.reason and one.title and one.instead for one in declared.FAMILIES.values())


@pytest.mark.parametrize(
    ("capability", "fp8", "attention"),
    [
        ((7, 5), "the card has no fp8 matmuls", "compute capability 8.0"),
        ((8, 0), "begin with compute capability 8.9", None),
        ((8, 6), "begin with compute capability 8.9", None),
        ((8, 9), None, None),
        ((9, 0), None, None),
        ((12, 0), None, None),
    ],
)
def test_by_card(card, capability, fp8, attention):
    card(capability)
    for name, expected in (("fp8", fp8), ("adder_triton", attention)):
        why = lacking(name)
        assert why is None if expected is None else expected in str(why)
    for name in ("rmsnorm", "rope", "swiglu", "lm_head_loss", "dropout_values", "nf4", "folded_lora"):
        assert lacking(name) is None  # which a trial decides
    for name in ("swiglu_backward", "dropout"):
        assert (lacking(name) is None) == (capability >= (8, 0))


def test_by_what_is_trained(card):
    card((9, 0))
    assert lacking("dropout", dropout=0.0) == "nothing is dropped"
    assert lacking("nf4", four_bit=False) == "no weight is in 4 bits"
    assert lacking("folded_lora", rank=0) == lacking("swiglu_backward", rank=0) == "there is no LoRA"
    assert "not float32" in str(lacking("rmsnorm", dtype="float32"))
    assert lacking("fp8", fp8=False) == "no matmul is to be in fp8"
    assert "compute_dtype: bfloat16" in str(lacking("fp8", dtype="float16"))
    assert "no multiples of 16" in str(lacking("fp8", intermediate=130))
    assert "caps attention scores" in str(lacking("adder_varlen", cap=50.0))
    assert "values are of size 128" in str(lacking("adder_triton", value_size=128))


def test_without_triton_what_needs_it_is_not_tried(card, monkeypatch):
    card((9, 0))
    for module in (declared, packed_attention):
        monkeypatch.setattr(module, "triton", None)
    assert lacking("rmsnorm") == lacking("adder_triton") == "Triton is not installed"
    assert lacking("folded_lora") is None  # by references, if that pays
