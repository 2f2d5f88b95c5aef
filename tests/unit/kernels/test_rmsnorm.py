"""RMSNorm's kernels are their references, in 16 bits and in fp8."""

import pytest
import torch

from adder.kernels import fp8, rmsnorm
from kernel_cases import DEVICE, ROUNDING, SIZES, assert_same_fp8, both_types, kernel, off, random


@kernel
@both_types
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rmsnorm_kernels_are_their_references(dtype, size, plus_one):
    x, weight = random(*size, dtype=dtype), random(size[1], dtype=dtype)
    out, exact = random(*size, dtype=dtype, gap=48), torch.empty(*size, device=DEVICE)
    inverse, _ = rmsnorm.rms_norm_into(x, weight, 1e-5, plus_one, out)
    expected, _ = rmsnorm.rms_norm_into_reference(x.float(), weight.float(), 1e-5, plus_one, exact)
    assert off(out, exact) < ROUNDING[dtype] and off(inverse, expected) < 1e-5
    for residual in (None, random(*size, dtype=dtype)):
        grad = random(*size, dtype=dtype, gap=48)
        exact_grad = grad.float()
        found, rows = rmsnorm.rms_norm_backward(grad, x, weight, inverse, plus_one, residual, with_fp8=True)
        wide = None if residual is None else residual.float()
        expected, _ = rmsnorm.rms_norm_backward_reference(
            exact_grad, x.float(), weight.float(), inverse, plus_one, wide
        )
        assert off(found, expected) < ROUNDING[dtype] and off(grad, exact) < ROUNDING[dtype]
        assert_same_fp8(rows, fp8.quantise_reference(found))
