"""Quantising to fp8 and matmuls in it: exact to what e4m3 allows, and kernels that are their references."""

import pytest
import torch

from adder.kernels import fp8, rmsnorm, swiglu, triton_utils
from kernel_cases import DEVICE, ROUNDING, assert_same_fp8, both_types, kernel, matmul_types, off, random

TWO_ROUNDINGS = 0.045


def test_quantised_rows_use_the_whole_range():
    x = torch.randn(9, 200) * torch.logspace(-8, 8, 9)[:, None]
    rows = fp8.quantise(x)
    assert rows.values.float().abs().amax(-1).eq(fp8.FP8_MAX).all()
    assert (rows.dequantised() - x).norm(dim=-1).div(x.norm(dim=-1)).max() < 0.035
    assert torch.equal(fp8.quantise(torch.zeros(2, 16)).dequantised(), torch.zeros(2, 16))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_matmul_is_off_by_two_roundings(direction):
    weight = torch.randn(96, 256) * torch.logspace(-2, 2, 96)[:, None]
    side = getattr(fp8.Fp8Weight(weight), direction)
    matrix = weight if direction == "forward" else weight.t()
    x = torch.randn(50, matrix.shape[1])
    assert off(fp8.matmul(fp8.quantise(x), side, torch.float32), x @ matrix.t()) < TWO_ROUNDINGS


def test_weights_take_two_bytes_a_value():
    assert fp8.Fp8Weight(torch.randn(64, 32)).nbytes == 2 * 64 * 32 + 4 * (64 + 32)


def test_cached_values_serve_what_they_were_made_of_alone():
    x, rows = torch.randn(4, 32), object()
    fp8.cache_fp8(x, rows)
    assert fp8.quantise_cached(x.view(2, 2, 32).view(4, 32)) is rows  # as autograd hands it on
    assert fp8.quantise_cached(x) is not rows  # only once
    fp8.cache_fp8(x, rows)
    assert fp8.quantise_cached(x.clone()) is not rows
    fp8.cache_fp8(x, rows)
    x += 1
    assert fp8.quantise_cached(x) is not rows
    fp8.cache_fp8(x, rows)
    assert fp8.quantise_cached(x[:2]) is not rows and fp8.quantise_cached(x) is not rows
    fp8.cache_fp8(x.clone(), rows)  # which is gone at once, and x may come to lie where it lay
    assert fp8.quantise_cached(x) is not rows


@kernel
@both_types
@pytest.mark.parametrize("size", [(1, 16), (37, 5000), (5, 64), (3, 14336), (2, 32768), (2, 33000)])
def test_quantising_kernel_is_its_reference(dtype, size):
    x = random(*size, dtype=dtype, gap=48) * torch.logspace(-6, 4, size[0], device=DEVICE)[:, None].to(dtype)
    x[0, 3] = 0
    found = fp8.quantise(x)
    assert_same_fp8(found, fp8.quantise_reference(x))
    if not triton_utils.INTERPRETED:
        assert found.values.float().abs().amax(-1).eq(fp8.FP8_MAX).all()
    assert not fp8.quantise(torch.zeros_like(x)).values.float().any()


@kernel
@matmul_types
@pytest.mark.parametrize(
    ("size", "rank"), [((1, 16), 3), ((70, 1000), 32), ((130, 5000), 100), ((5, 64), 0), ((9, 80), 200)]
)
def test_kernel_that_quantises_and_multiplies_is_its_reference(dtype, size, rank):
    x, b = random(*size, dtype=dtype), random(size[1], rank, dtype=dtype, gap=8)
    found, low_rank = fp8.quantise_and_matmul(x, x.float().abs().amax(-1), b)
    assert_same_fp8(found, fp8.quantise_reference(x))
    assert low_rank.shape == (size[0], rank) and low_rank.dtype == dtype
    assert not rank or off(low_rank, x.float() @ b.float()) < ROUNDING[dtype]


@pytest.mark.gpu
def test_fp8_shows_what_is_not_a_number():
    x = random(3, 64, dtype=torch.bfloat16)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    wide = fp8.quantise(x).dequantised()
    assert torch.isfinite(wide[0]).all() and not torch.isfinite(wide[1]).all() and not torch.isfinite(wide[2]).all()


@kernel
@both_types
@pytest.mark.parametrize("size", [(1, 64), (13, 1000), (9, 17000)])
def test_kernels_that_quantise_write_the_fp8_of_what_they_write(dtype, size):
    x, weight = random(*size, dtype=dtype), random(size[1], dtype=dtype)
    plain, out = torch.empty_like(x), random(*size, dtype=dtype, gap=48)
    rmsnorm.rms_norm_into(x, weight, 1e-5, False, plain)
    _, found = rmsnorm.rms_norm_into(x, weight, 1e-5, False, out, with_fp8=True)
    assert torch.equal(out, plain)
    assert_same_fp8(found, fp8.quantise_reference(out))
    gate_up = random(size[0], 2 * size[1], dtype=dtype)
    swiglu.swiglu_into(gate_up, "silu", plain)
    found = swiglu.swiglu_into(gate_up, "silu", out, with_fp8=True)
    assert torch.equal(out, plain)
    assert_same_fp8(found, fp8.quantise_reference(out))


@kernel
@matmul_types
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 64, 8), (70, 200, 16), (65, 136, 104), (3, 32, 0)])
@pytest.mark.parametrize("more", [False, True])
def test_lora_kernel_is_its_reference(dtype, rows, width, rank, more):
    y, residual, bias = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype), random(width, dtype=dtype)
    low_rank, b = random(rows, rank, dtype=dtype, gap=5), random(width, rank, dtype=dtype, gap=9)
    options = (residual, bias) if more else (None, None)
    exact = y.float()
    fp8.add_lora_reference(exact, low_rank, b, *options)
    fp8.add_lora(y, low_rank, b, *options)
    assert off(y, exact) < ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 16, 32), (300, 1408, 512), (257, 6144, 4096)])
def test_fp8_matmul_on_tensor_cores_is_its_reference(tokens, outputs, inputs):
    """Both directions on the tensor cores against the dequantised values in fp32: rounding to bf16, and the narrow
    sums of Hopper's fp8 instructions, which keep about 14 bits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 matmuls need compute capability 9.0")
    weight = fp8.Fp8Weight(random(outputs, inputs, dtype=torch.bfloat16))
    for side, width in ((weight.forward, inputs), (weight.backward, outputs)):
        rows = fp8.quantise(random(tokens, width, dtype=torch.bfloat16))
        assert off(fp8.matmul(rows, side, torch.bfloat16), fp8.matmul_reference(rows, side)) < 6e-3
