"""Dropout inside LoRA's matmuls: a mask that is random enough, and kernels that are their references."""

import pytest
import torch

from adder.kernels import dropout
from kernel_cases import DEVICE, ROUNDING, SIZES, both_types, kernel, matmul_types, off, random


def test_dropout_mask_is_random_enough():
    """Share kept, and no correlation between neighbours in a row, in a column, or between seeds (5 standard errors)."""
    mask = dropout.dropout_mask(12345, 512, 512, 0.1).float()
    error = 5 * (0.09 / mask.numel()) ** 0.5
    assert mask.mean().item() == pytest.approx(0.9, abs=error)
    other = dropout.dropout_mask(12346, 512, 512, 0.1).float()
    for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask, other)):
        assert abs(((a - 0.9) * (b - 0.9)).mean().item()) < error


@kernel
@matmul_types
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_dropout_kernels_are_their_references(dtype, size, rank):
    """The same mask as the reference's, to the last value: one wrong would be seen."""
    (rows, width), p, seed = size, 0.3, 2**31 - 7
    x, a = random(*size, dtype=dtype, gap=64), random(rank, width, dtype=dtype)
    grad = random(rows, rank, dtype=dtype, gap=8)
    out, exact = random(rows, rank, dtype=dtype, gap=3), torch.empty(rows, rank, device=DEVICE)
    dropout.dropout_matmul(x, a, seed, p, out)
    dropout.dropout_matmul_reference(x.float(), a.float(), seed, p, exact)
    assert off(out, exact) < ROUNDING[dtype]
    expected = dropout.dropout_matmul_grad_a_reference(grad.float(), x.float(), seed, p)
    assert off(dropout.dropout_matmul_grad_a(grad, x, seed, p), expected) < 1e-5
    total = random(*size, dtype=dtype, gap=64)
    exact = total.float()
    dropout.add_dropout_matmul_grad_x_reference(exact, grad.float(), a.float(), seed, p)
    dropout.add_dropout_matmul_grad_x(total, grad, a, seed, p)
    assert off(total, exact) < ROUNDING[dtype]


@kernel
@both_types
@pytest.mark.parametrize("size", SIZES)
def test_values_are_dropped_as_their_reference_does(dtype, size):
    x = random(*size, dtype=dtype, gap=64)
    found, expected = dropout.dropped(x, 2**31 - 7, 0.3), dropout.dropped_reference(x, 2**31 - 7, 0.3)
    assert torch.equal(found == 0, expected == 0) and off(found, expected) < ROUNDING[dtype]


def test_where_triton_has_no_matmuls_torch_multiplies_what_was_dropped(monkeypatch):
    """As on a T4: the same results and gradients, from matmuls of torch's own."""
    monkeypatch.setattr(dropout, "runs_kernels", lambda tensor, family: family == "dropout_values")
    monkeypatch.setattr(dropout, "dropped", dropout.dropped_reference)
    x, a, grad = torch.randn(40, 24), torch.randn(5, 24), torch.randn(40, 5)
    found, expected = torch.empty(40, 9)[:, :5], torch.empty(40, 5)
    dropout.dropout_matmul(x, a, 7, 0.3, found)
    dropout.dropout_matmul_reference(x, a, 7, 0.3, expected)
    assert off(found, expected) < 1e-6
    assert (
        off(dropout.dropout_matmul_grad_a(grad, x, 7, 0.3), dropout.dropout_matmul_grad_a_reference(grad, x, 7, 0.3))
        < 1e-6
    )
    total, exact = torch.ones(40, 24), torch.ones(40, 24)
    dropout.add_dropout_matmul_grad_x(total, grad, a, 7, 0.3)
    dropout.add_dropout_matmul_grad_x_reference(exact, grad, a, 7, 0.3)
    assert off(total, exact) < 1e-6
