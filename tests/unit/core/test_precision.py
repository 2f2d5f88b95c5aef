"""The dtype follows from the hardware, and from what oneDNN is told to do without."""

import pytest

from adder.core import precision
from adder.core.machine import graphics_cards


def test_a_dtype_that_was_asked_for_is_taken():
    assert precision.compute_dtype("cpu", "float16").value == "float16"


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx2", "float32"), ("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16")]
)
def test_a_cpu_computes_in_bf16_only_where_it_has_instructions_for_it(monkeypatch, flags, dtype):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision, "_cpu_flags", lambda: {flags, "fpu"})
    assert precision.compute_dtype("cpu").value == dtype


def test_a_cpu_that_is_told_to_act_as_an_older_one_is_treated_as_such(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert precision.compute_dtype("cpu").value == "float32"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_computes_in_bf16_from_ampere_on(monkeypatch, capability, dtype):
    monkeypatch.setattr(graphics_cards, "card", lambda: graphics_cards.Card(0, "A card", capability, 16 * 2**30))
    choice = precision.compute_dtype("cuda")
    assert choice.value == dtype and "A card" in choice.reason
