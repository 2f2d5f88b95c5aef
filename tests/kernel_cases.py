"""Where kernels are tested, on what, and how far they may be off."""

import pytest
import torch

from adder.kernels import fp8, triton_utils

DEVICE = "cpu" if triton_utils.INTERPRETED else "cuda"


# On a GPU, or by the interpreter: tests/unit/kernels/test_interpreted.py starts all of these in a process of its own.
kernel = pytest.mark.interpreted if triton_utils.INTERPRETED else pytest.mark.gpu


both_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def random(*shape: int, dtype=torch.float32, gap: int = 0) -> torch.Tensor:
    """Normal values, in rows that lie `gap` values apart."""
    wide = torch.randn(*shape[:-1], shape[-1] + gap, device=DEVICE).to(dtype)
    return wide[..., : shape[-1]]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# Rounding of one bf16 or fp16 value is at most 2^-9 or 2^-12 of it; half as much in the mean, over some steps.
# (The interpreter cuts bf16 off where a GPU rounds.)
ROUNDING = {torch.bfloat16: 8e-3 if triton_utils.INTERPRETED else 4e-3, torch.float16: 5e-4}


# More rows and columns than a tile has; the interpreter takes a moment for each program.
SIZES = [(1, 64), (70, 136)] if triton_utils.INTERPRETED else [(1, 64), (300, 1000), (129, 4096)]


# The interpreter multiplies the bits of bf16 matrices, not their values.
matmul_types = pytest.mark.parametrize(
    "dtype", [torch.float16] if triton_utils.INTERPRETED else [torch.bfloat16, torch.float16]
)


def assert_same_fp8(found: fp8.RowwiseFp8, expected: fp8.RowwiseFp8) -> None:
    """Scales within fp32's rounding; of the values one in a thousand, near the middle of two, may be the other one."""
    assert off(found.scales, expected.scales) < 1e-6
    assert torch.isfinite(found.values.float()).all()
    same = (found.values.float() == expected.values.float()).float().mean().item()
    if triton_utils.INTERPRETED:  # which halves what it should round up to a power of two
        assert same > 0.9
    else:
        assert same > 0.999 and off(found.dequantised(), expected.dequantised()) < 5e-3
