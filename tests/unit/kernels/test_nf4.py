"""Dequantised 4-bit weights are bitsandbytes' own."""

import pytest

from adder.kernels import nf4, triton_utils
from kernel_cases import ROUNDING, both_types, kernel, off, random


@kernel
@both_types
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantised_values_are_those_of_bitsandbytes(dtype, nested, kind):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = random(320, 1088, dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    out = random(320, 1088, dtype=dtype, gap=64)
    nf4.dequantise_into(packed, state, out)
    assert off(out, dequantize_4bit(packed, state)) <= (ROUNDING[dtype] if triton_utils.INTERPRETED else 0)
