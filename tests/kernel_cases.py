"""Where kernels are tested, on what, and how far they may be off."""

import pytest
import torch

from adder.kernels import triton_utils

DEVICE = "cpu" if triton_utils.INTERPRETED else "cuda"


kernel = pytest.mark.slow if triton_utils.INTERPRETED else pytest.mark.gpu


both_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def random(*shape: int, dtype=torch.float32, gap: int = 0) -> torch.Tensor:
    """Normal numbers, in rows that lie `gap` numbers apart."""
    wide = torch.randn(*shape[:-1], shape[-1] + gap, device=DEVICE).to(dtype)
    return wide[..., : shape[-1]]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
