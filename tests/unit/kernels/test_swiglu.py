"""SwiGLU's kernels are their references, forward and backward, with LoRA that fp8 matmuls have deferred and without."""

import pytest
import torch

from adder.kernels import fp8, swiglu, triton_utils
from kernel_cases import DEVICE, ROUNDING, SIZES, assert_same_fp8, kernel, matmul_types, off, random


@kernel
@matmul_types
@pytest.mark.parametrize("size", [*SIZES, (520, 24) if triton_utils.INTERPRETED else (2000, 200)])
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
def test_swiglu_kernels_are_their_references(dtype, size, activation, ranks, dropout):
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
    expected, lora = swiglu.swiglu_backward_reference(gate_up.float(), *arguments)
    found, lora_found = swiglu.swiglu_backward(gate_up, *arguments)
    assert off(found, expected) < ROUNDING[dtype]
    for name, matrix in vars(lora).items():
        if matrix is None:
            assert getattr(lora_found, name) is None
        else:
            assert off(getattr(lora_found, name), matrix) < ROUNDING[dtype], name


def deferred_of(rows, width, gate, up, biased, dtype) -> tuple[list, swiglu.DeferredLora]:
    """x·Aᵀ of gate and up, and what gate_up lacks: B as it stands in a group's matrix, beside another's columns."""
    low_rank = [random(rows, rank, dtype=dtype, gap=9) if rank else None for rank in (gate, up)]
    b = [random(width, rank, dtype=dtype, gap=7) if rank else None for rank in (gate, up)]
    return low_rank, swiglu.DeferredLora(*b, random(2 * width, dtype=dtype) if biased else None)


deferred_cases = pytest.mark.parametrize(
    ("activation", "ranks", "biased"),
    [
        ("silu", (16, 16, 16), False),
        ("silu", (0, 0, 0), False),
        ("silu", (8, 0, 40), True),
        ("gelu_tanh", (64, 9, 0), True),
    ],
)


@kernel
@matmul_types
@pytest.mark.parametrize("size", SIZES)
@deferred_cases
def test_lora_swiglu_fp8_kernel_is_its_reference(dtype, size, activation, ranks, biased):
    """The errors of three roundings: of gate_up, of what comes of it, of its matmul."""
    (rows, width), (down, *others) = size, ranks
    gate_up, a = random(rows, 2 * width, dtype=dtype), random(down, width, dtype=dtype)
    low_rank, deferred = deferred_of(*size, *others, biased, dtype)
    found, low_found = swiglu.lora_swiglu_fp8(gate_up, activation, *low_rank, deferred, a)
    _, exact = swiglu.lora_swiglu_fp8_reference(gate_up.float(), activation, *low_rank, deferred, a)
    assert low_found.shape == (rows, down) and (not down or off(low_found, exact) < 2 * ROUNDING[dtype])
    expected, _ = swiglu.lora_swiglu_fp8_reference(gate_up, activation, *low_rank, deferred, a)
    assert off(found.scales, expected.scales) < ROUNDING[dtype]
    assert torch.isfinite(found.values.float()).all()
    if not triton_utils.INTERPRETED:  # see assert_same_fp8
        assert off(found.dequantised(), expected.dequantised()) < 5e-3
    same = (found.values.float() == expected.values.float()).float().mean()
    assert same > (0.8 if triton_utils.INTERPRETED else 0.99)  # of few values in the smallest case


@kernel
@matmul_types
@pytest.mark.parametrize("size", SIZES)
@deferred_cases
def test_swiglu_backward_kernel_adds_deferred_lora(dtype, size, activation, ranks, biased):
    (rows, width), (down, *others) = size, ranks
    gate_up, grad = random(rows, 2 * width, dtype=dtype), random(*size, dtype=dtype, gap=48)
    low_rank, deferred = deferred_of(*size, *others, biased, dtype)
    pair = (random(rows, down, dtype=dtype), random(down, width, dtype=dtype)) if down else None
    arguments = (grad, activation, pair, *low_rank, None, deferred)
    expected, lora = swiglu.swiglu_backward_reference(gate_up.float(), *arguments)
    found, lora_found = swiglu.swiglu_backward(gate_up, *arguments)
    assert off(found, expected) < 2 * ROUNDING[dtype]
    for name, matrix in vars(lora).items():
        assert (matrix is None) == (getattr(lora_found, name) is None)
        assert matrix is None or off(getattr(lora_found, name), matrix) < 2 * ROUNDING[dtype], name


@kernel
@matmul_types
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize("rank", [16, 64])
def test_forward_and_backward_have_the_same_hidden_values(dtype, activation, rank):
    """Multiplied with ones, they come out of both kernels: h·aᵀ forward, the gradient to a backward.

    But for one value in fifty, which a multiplication fused with an addition may round the other way.
    """
    rows, width = 13, 64
    gate_up, grad = random(rows, 2 * width, dtype=dtype), random(rows, width, dtype=dtype)
    low_rank, deferred = deferred_of(rows, width, rank, rank, True, dtype)
    one = torch.eye(64, dtype=dtype, device=DEVICE)
    found, hidden = swiglu.lora_swiglu_fp8(gate_up, activation, *low_rank, deferred, one)
    pair = (one[:rows, :16].contiguous(), random(16, width, dtype=dtype))
    _, lora = swiglu.swiglu_backward(gate_up, grad, activation, pair, *low_rank, None, deferred)
    difference = (hidden.float() - lora.down_a[:rows]).abs()
    assert (difference <= 2 * torch.finfo(dtype).eps * hidden.float().abs()).all()
    assert (difference > 0).float().mean() < 0.02
    assert_same_fp8(found, fp8.quantise_reference(hidden))


@pytest.mark.parametrize("dropout", [None, (7, 0.3)])
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
def test_where_triton_has_no_matmuls_torch_multiplies_around_the_activation(monkeypatch, activation, dropout):
    """As on a T4: the same gradients, from matmuls of torch's own and a kernel without any."""

    def alone(gate_up, grad, activation, down, gate, up, dropout, deferred):
        assert down is gate is up is dropout is deferred is None
        return swiglu.swiglu_backward_reference(gate_up, grad, activation)

    monkeypatch.setattr(swiglu, "runs_kernels", lambda tensor, family: family == "swiglu")
    monkeypatch.setattr(swiglu, "_swiglu_backward_by_kernel", alone)
    monkeypatch.setattr(swiglu, "swiglu_into", swiglu.swiglu_into_reference)
    gate_up, grad, rank = torch.randn(40, 48), torch.randn(40, 30)[:, :24], 5
    down = (torch.randn(40, rank), torch.randn(rank, 24))
    low_ranks = (torch.randn(40, rank), None)
    for given in (down, None):
        arguments = (gate_up, grad, activation, given, *low_ranks, dropout if given else None)
        found, grads = swiglu.swiglu_backward(*arguments)
        expected, exact = swiglu.swiglu_backward_reference(*arguments)
        assert off(found, expected) < 1e-6 and off(grads.gate_b, exact.gate_b) < 1e-6
        assert grads.up_b is None and (grads.down_a is None) == (given is None)
        assert given is None or off(grads.down_a, exact.down_a) < 1e-6
