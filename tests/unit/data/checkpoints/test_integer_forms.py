"""Which forms of GPTQ, AWQ and AutoRound are known, by what config.json says."""

import re

import pytest

from adder.data.checkpoints.integer_forms import AWQ_ORDER, packing, problem


@pytest.mark.parametrize(
    ("method", "settings", "packed", "added"),
    [
        ("gptq", {"bits": 4, "sym": True, "group_size": 128}, "inputs", 1),
        ("gptq", {"bits": 3, "checkpoint_format": "gptq"}, "inputs", 1),
        ("gptq", {"bits": 8, "checkpoint_format": "gptq_v2", "pack_dtype": "int32"}, "inputs", 0),
        ("gptq", {"bits": 4, "format": "gptq_v2"}, "inputs", 0),
        ("awq", {"w_bit": 4, "version": "GEMM"}, "outputs", 0),
        ("auto-round", {"bits": 4, "packing_format": "auto_round:auto_gptq"}, "inputs", 1),
        ("auto-round", {"bits": 2, "packing_format": "auto_round"}, "inputs", 0),
        ("auto-round", {"bits": 4, "packing_format": "auto_round:auto_awq"}, "outputs", 0),
        ("auto-round", {"bits": 4, "backend": "auto"}, "inputs", 1),
    ],
)
def test_each_form_is_known_by_its_settings(method, settings, packed, added):
    assert problem(method, settings) is None
    found = packing(method, settings)
    assert (found.packed, found.added) == (packed, added)
    assert found.order == (AWQ_ORDER if packed == "outputs" else None)


def test_what_layers_differ_in_is_not_asked_of_all_of_them():
    settings = {"bits": 4, "sym": True, "desc_act": True, "group_size": 64}
    found = packing("gptq", settings)
    assert (found.symmetric, found.reordered, found.group_size) == (True, True, 64)
    for differing in ({"dynamic": {"+:.*q_proj": {"bits": 8}}}, {"extra_config": {"q_proj": {"bits": 8}}}):
        found = packing("gptq", settings | differing)
        assert (found.symmetric, found.reordered, found.group_size) == (None, None, None)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("gptq", {"bits": 4, "checkpoint_format": "marlin"}, "forms gptq and gptq_v2 .* not marlin"),
        ("gptq", {"bits": 4, "is_marlin_format": True}, "not marlin"),
        ("gptq", {"bits": 4, "checkpoint_format": "bitblas"}, "not bitblas"),
        ("gptq", {"bits": 4, "pack_dtype": "int64"}, "words of 32 bits .* not int64"),
        ("gptq", {"bits": 1}, "2 to 8 bits .* not 1"),
        ("awq", {"bits": 4, "version": "gemv_fast"}, "not 4 bit in gemv_fast"),
        ("awq", {"w_bit": 8}, "not 8 bit in gemm"),
        (
            "auto-round",
            {"bits": 4, "data_type": "mx_fp", "packing_format": "auto_round:llm_compressor"},
            "not mx_fp in",
        ),
        ("auto-round", {"bits": 4, "packing_format": "auto_round:mlx"}, "not int in auto_round:mlx"),
    ],
)
def test_other_forms_are_told(method, settings, words):
    found = problem(method, settings)
    assert found is not None and re.search(words, found)
