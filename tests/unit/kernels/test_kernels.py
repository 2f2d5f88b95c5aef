"""Each Triton kernel against its plain PyTorch reference in fp32: on a GPU, or by Triton's interpreter.

`pytest -m gpu` runs them on a GPU; TRITON_INTERPRET=1 runs them on a CPU where Triton is installed, a few times slower
than one would like.
"""

import pytest
import torch

from adder.kernels import dropout as dropout_kernels
from adder.kernels import fp8, nf4, rmsnorm, rope, swiglu, triton_utils
from kernel_cases import DEVICE, both_types, kernel, off, random

# Rounding of one bf16 or fp16 number is at most 2^-9 or 2^-12 of it; half as much in the mean, over some steps.
# (The interpreter cuts bf16 off where a GPU rounds.)
ROUNDING = {torch.bfloat16: 8e-3 if triton_utils.INTERPRETED else 4e-3, torch.float16: 5e-4}
SIZES = [(1, 64), (300, 1000), (129, 4096)]
# The interpreter multiplies the bits of bf16 matrices, not their numbers.
product_types = pytest.mark.parametrize(
    "dtype", [torch.float16] if triton_utils.INTERPRETED else [torch.bfloat16, torch.float16]
)


def test_dropout_mask_is_random_enough():
    """Share kept, and no correlation between neighbours in a row, in a column, or between seeds (5 standard errors)."""
    mask = dropout_kernels.dropout_mask(12345, 512, 512, 0.1).float()
    error = 5 * (0.09 / mask.numel()) ** 0.5
    assert mask.mean().item() == pytest.approx(0.9, abs=error)
    other = dropout_kernels.dropout_mask(12346, 512, 512, 0.1).float()
    for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask, other)):
        assert abs(((a - 0.9) * (b - 0.9)).mean().item()) < error


@kernel
@both_types
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_norm_kernels(dtype, size, plus_one):
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


@kernel
@product_types
@pytest.mark.parametrize("size", [*SIZES, (2000, 200)])
@pytest.mark.parametrize(
    ("activation", "ranks", "dropout"),
    [
        ("silu", (0, 0, 0), None),
        ("silu", (16, 16, 16), None),
        ("silu", (16, 16, 16), (77, 0.3)),
        ("silu", (0, 40, 0), None),
        ("silu", (72, 9, 20), None),
        ("gelu_tanh", (16, 16, 16), None),
        ("gelu_tanh", (3, 0, 8), (77, 0.3)),
    ],
)
def test_gated_kernels(dtype, size, activation, ranks, dropout):
    (rows, width), (down, *others) = size, ranks
    gate_up = random(rows, 2 * width, dtype=dtype) * 2
    out, exact = random(*size, dtype=dtype, gap=48), torch.empty(*size, device=DEVICE)
    swiglu.swiglu_into(gate_up, activation, out)
    swiglu.swiglu_into_reference(gate_up.float(), activation, exact)
    assert off(out, exact) < ROUNDING[dtype]
    pair = (random(rows, down, dtype=dtype, gap=5), random(down, width, dtype=dtype)) if down else None
    low_rank = [random(rows, rank, dtype=dtype, gap=9) if rank else None for rank in others]
    grad = random(*size, dtype=dtype, gap=48)
    arguments = (grad, activation, pair, *low_rank, dropout)
    expected, thin = swiglu.swiglu_backward_reference(gate_up.float(), *arguments)
    found, thin_found = swiglu.swiglu_backward(gate_up, *arguments)
    assert off(found, expected) < ROUNDING[dtype]
    for name, matrix in vars(thin).items():
        if matrix is None:
            assert getattr(thin_found, name) is None
        else:
            assert off(getattr(thin_found, name), matrix) < ROUNDING[dtype], name


def left_out_of(rows, width, gate, up, biased, dtype) -> tuple[list, swiglu.DeferredLora]:
    """x·Aᵀ of gate and up, and what gate_up lacks: B as it stands in a group's matrix, beside another's columns."""
    low_rank = [random(rows, rank, dtype=dtype, gap=9) if rank else None for rank in (gate, up)]
    b = [random(width, rank, dtype=dtype, gap=7) if rank else None for rank in (gate, up)]
    return low_rank, swiglu.DeferredLora(*b, random(2 * width, dtype=dtype) if biased else None)


left_out = pytest.mark.parametrize(
    ("activation", "ranks", "biased"),
    [
        ("silu", (16, 16, 16), False),
        ("silu", (0, 0, 0), False),
        ("silu", (8, 0, 40), True),
        ("gelu_tanh", (64, 9, 0), True),
    ],
)


@kernel
@product_types
@pytest.mark.parametrize("size", SIZES)
@left_out
def test_lora_swiglu_fp8_kernel(dtype, size, activation, ranks, biased):
    """The errors of three roundings: of gate_up, of what comes of it, of its product."""
    (rows, width), (down, *others) = size, ranks
    gate_up, a = random(rows, 2 * width, dtype=dtype), random(down, width, dtype=dtype)
    low_rank, lacking = left_out_of(*size, *others, biased, dtype)
    found, low_found = swiglu.lora_swiglu_fp8(gate_up, activation, *low_rank, lacking, a)
    _, exact = swiglu.lora_swiglu_fp8_reference(gate_up.float(), activation, *low_rank, lacking, a)
    assert low_found.shape == (rows, down) and (not down or off(low_found, exact) < 2 * ROUNDING[dtype])
    expected, _ = swiglu.lora_swiglu_fp8_reference(gate_up, activation, *low_rank, lacking, a)
    assert off(found.scales, expected.scales) < ROUNDING[dtype]
    assert torch.isfinite(found.values.float()).all()
    if not triton_utils.INTERPRETED:  # see assert_same_fp8
        assert off(found.dequantised(), expected.dequantised()) < 5e-3
    same = (found.values.float() == expected.values.float()).float().mean()
    assert same > (0.9 if triton_utils.INTERPRETED else 0.99)


@kernel
@product_types
@pytest.mark.parametrize("size", SIZES)
@left_out
def test_gated_backward_kernel_adds_what_gate_up_lacks(dtype, size, activation, ranks, biased):
    (rows, width), (down, *others) = size, ranks
    gate_up, grad = random(rows, 2 * width, dtype=dtype), random(*size, dtype=dtype, gap=48)
    low_rank, lacking = left_out_of(*size, *others, biased, dtype)
    pair = (random(rows, down, dtype=dtype), random(down, width, dtype=dtype)) if down else None
    arguments = (grad, activation, pair, *low_rank, None, lacking)
    expected, thin = swiglu.swiglu_backward_reference(gate_up.float(), *arguments)
    found, thin_found = swiglu.swiglu_backward(gate_up, *arguments)
    assert off(found, expected) < 2 * ROUNDING[dtype]
    for name, matrix in vars(thin).items():
        assert (matrix is None) == (getattr(thin_found, name) is None)
        assert matrix is None or off(getattr(thin_found, name), matrix) < 2 * ROUNDING[dtype], name


@kernel
@product_types
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize("rank", [16, 64])
def test_forward_and_backward_have_the_same_hidden_numbers(dtype, activation, rank):
    """Multiplied with ones, they come out of both kernels: h·aᵀ forward, the gradient to a backward.

    But for one number in fifty, which a multiplication fused with an addition may round the other way.
    """
    rows, width = 13, 64
    gate_up, grad = random(rows, 2 * width, dtype=dtype), random(rows, width, dtype=dtype)
    low_rank, lacking = left_out_of(rows, width, rank, rank, True, dtype)
    one = torch.eye(64, dtype=dtype, device=DEVICE)
    found, hidden = swiglu.lora_swiglu_fp8(gate_up, activation, *low_rank, lacking, one)
    pair = (one[:rows, :16].contiguous(), random(16, width, dtype=dtype))
    _, thin = swiglu.swiglu_backward(gate_up, grad, activation, pair, *low_rank, None, lacking)
    difference = (hidden.float() - thin.down_a[:rows]).abs()
    assert (difference <= 2 * torch.finfo(dtype).eps * hidden.float().abs()).all()
    assert (difference > 0).float().mean() < 0.02
    assert_same_fp8(found, fp8.quantise_reference(hidden))


@kernel
@both_types
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (9, 64), (40, 128), (5, 80)])
def test_rotary_kernel(dtype, heads, size):
    source = random(26, heads * size, dtype=dtype, gap=64).unflatten(1, (heads, size))
    angles = torch.randn(13, size // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = source.float()
    rope.apply_rope_reference(exact, cos.float(), sin.float())
    rope.apply_rope(source, cos, sin)
    assert off(source, exact) < ROUNDING[dtype]


@kernel
@both_types
@pytest.mark.parametrize(("heads", "groups", "size"), [(1, 1, 16), (9, 3, 64), (32, 8, 128), (6, 2, 80)])
@pytest.mark.parametrize("turned", [True, False])
def test_turning_back_kernel(dtype, heads, groups, size, turned):
    """Of gradients as attention leaves them: heads next to each other, or tokens, or with gaps."""
    query = random(26, heads * size, dtype=dtype, gap=64).unflatten(1, (heads, size))
    key = random(groups, 26 * size, dtype=dtype).unflatten(1, (26, size)).transpose(0, 1)
    value = random(26 * groups, size, dtype=dtype).t().contiguous().t().unflatten(0, (26, groups))
    angles = torch.randn(13, size // 2, device=DEVICE).repeat(1, 2)
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if turned else (None, None)
    wide = [None if table is None else table.float() for table in tables]
    exact, _ = rope.rope_backward_reference(tuple(x.float() for x in (query, key, value)), *wide)
    found, rows = rope.rope_backward((query, key, value), *tables, with_fp8=True)
    assert off(found, exact) < ROUNDING[dtype]
    assert_same_fp8(rows, fp8.quantise_reference(found))
    plain, rows = rope.rope_backward((query, key, value), *tables)
    assert rows is None and torch.equal(plain, found)
    if turned:
        both = plain[:, : (heads + groups) * size].unflatten(1, (-1, size))
        rope.apply_rope(both, *tables)
        assert off(both, torch.cat([query, key], 1).float()) < 2 * ROUNDING[dtype]


@kernel
@product_types
@pytest.mark.parametrize(("heads", "turned", "size"), [(3, 2, 16), (12, 9, 64), (6, 5, 128), (5, 5, 80)])
@pytest.mark.parametrize(("rank", "biased"), [(0, False), (24, True), (104, False)])
def test_low_rank_and_rotary_kernel(dtype, heads, turned, size, rank, biased):
    """Two sequences of 39 tokens, more than one tile."""
    y, b = random(78, heads * size, dtype=dtype), random(heads * size, rank, dtype=dtype, gap=8)
    low_rank, bias = random(78, rank, dtype=dtype, gap=5), random(heads * size, dtype=dtype) if biased else None
    angles = torch.randn(39, size // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = y.float()
    rope.add_lora_and_rope_reference(exact, low_rank, b, bias, cos, sin, size, turned)
    plain = y.float()
    fp8.add_lora_reference(plain, low_rank, b, None, bias)
    rope.add_lora_and_rope(y, low_rank, b, bias, cos, sin, size, turned)
    assert off(y, exact) < ROUNDING[dtype]
    values = slice(turned * size, None)
    assert turned == heads or off(y[:, values], plain[:, values]) < ROUNDING[dtype]
    assert off(exact[:, : turned * size], plain[:, : turned * size]) > 0.5


@kernel
@product_types
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_dropout_kernels(dtype, size, rank):
    """The same mask as the reference's, to the last number: one wrong would be seen."""
    (rows, width), p, seed = size, 0.3, 2**31 - 7
    x, a = random(*size, dtype=dtype, gap=64), random(rank, width, dtype=dtype)
    grad = random(rows, rank, dtype=dtype, gap=8)
    out, exact = random(rows, rank, dtype=dtype, gap=3), torch.empty(rows, rank, device=DEVICE)
    dropout_kernels.dropout_matmul(x, a, seed, p, out)
    dropout_kernels.dropout_matmul_reference(x.float(), a.float(), seed, p, exact)
    assert off(out, exact) < ROUNDING[dtype]
    expected = dropout_kernels.dropout_matmul_grad_a_reference(grad.float(), x.float(), seed, p)
    assert off(dropout_kernels.dropout_matmul_grad_a(grad, x, seed, p), expected) < 1e-5
    total = random(*size, dtype=dtype, gap=64)
    exact = total.float()
    dropout_kernels.add_dropout_matmul_grad_x_reference(exact, grad.float(), a.float(), seed, p)
    dropout_kernels.add_dropout_matmul_grad_x(total, grad, a, seed, p)
    assert off(total, exact) < ROUNDING[dtype]


@kernel
@both_types
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantisation_kernel(dtype, nested, kind):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = random(320, 1088, dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    out = random(320, 1088, dtype=dtype, gap=64)
    nf4.dequantise_into(packed, state, out)
    assert off(out, dequantize_4bit(packed, state)) <= (ROUNDING[dtype] if triton_utils.INTERPRETED else 0)


def assert_same_fp8(found: fp8.RowwiseFp8, expected: fp8.RowwiseFp8) -> None:
    """Scales within fp32's rounding; of the values one in a thousand, near the middle of two, may be the other one."""
    assert off(found.scales, expected.scales) < 1e-6
    assert torch.isfinite(found.values.float()).all()
    same = (found.values.float() == expected.values.float()).float().mean().item()
    if triton_utils.INTERPRETED:  # which halves what it should round up to a power of two
        assert same > 0.9
    else:
        assert same > 0.999 and off(found.dequantised(), expected.dequantised()) < 5e-3


@kernel
@both_types
@pytest.mark.parametrize("size", [(1, 16), (37, 5000), (5, 64), (3, 14336), (2, 32768), (2, 33000)])
def test_fp8_kernel(dtype, size):
    x = random(*size, dtype=dtype, gap=48) * torch.logspace(-6, 4, size[0], device=DEVICE)[:, None].to(dtype)
    x[0, 3] = 0
    found = fp8.quantise(x)
    assert_same_fp8(found, fp8.quantise_reference(x))
    if not triton_utils.INTERPRETED:
        assert found.values.float().abs().amax(-1).eq(fp8.FP8_MAX).all()
    assert not fp8.quantise(torch.zeros_like(x)).values.float().any()


@kernel
@product_types
@pytest.mark.parametrize(
    ("size", "rank"), [((1, 16), 3), ((70, 1000), 32), ((130, 5000), 100), ((5, 64), 0), ((9, 80), 200)]
)
def test_kernel_that_quantises_and_multiplies(dtype, size, rank):
    x, b = random(*size, dtype=dtype), random(size[1], rank, dtype=dtype, gap=8)
    found, product = fp8.quantise_and_matmul(x, x.float().abs().amax(-1), b)
    assert_same_fp8(found, fp8.quantise_reference(x))
    assert product.shape == (size[0], rank) and product.dtype == dtype
    assert not rank or off(product, x.float() @ b.float()) < ROUNDING[dtype]


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
@product_types
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 64, 8), (70, 200, 16), (65, 136, 104), (3, 32, 0)])
@pytest.mark.parametrize("more", [False, True])
def test_low_rank_kernel(dtype, rows, width, rank, more):
    y, residual, bias = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype), random(width, dtype=dtype)
    low_rank, b = random(rows, rank, dtype=dtype, gap=5), random(width, rank, dtype=dtype, gap=9)
    options = (residual, bias) if more else (None, None)
    exact = y.float()
    fp8.add_lora_reference(exact, low_rank, b, *options)
    fp8.add_lora(y, low_rank, b, *options)
    assert off(y, exact) < ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 16, 32), (300, 1408, 512), (257, 6144, 4096)])
def test_fp8_product(tokens, outputs, inputs):
    """Both directions on the tensor cores against the dequantised numbers in fp32: rounding to bf16, and the narrow
    sums of Hopper's fp8 instructions, which keep about 14 bits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 matmuls need compute capability 9.0")
    weight = fp8.Fp8Weight(random(outputs, inputs, dtype=torch.bfloat16))
    for side, width in ((weight.forward, inputs), (weight.backward, outputs)):
        rows = fp8.quantise(random(tokens, width, dtype=torch.bfloat16))
        assert off(fp8.matmul(rows, side, torch.bfloat16), fp8.matmul_reference(rows, side)) < 6e-3
