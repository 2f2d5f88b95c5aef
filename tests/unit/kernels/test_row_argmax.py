"""The largest value's place in wide rows, also where several are as large."""

import pytest
import torch

from adder.kernels.row_argmax import row_argmax
from kernel_cases import DEVICE, both_types, kernel, random


@kernel
@both_types
@pytest.mark.parametrize("shape", [(3, 50), (7, 4096), (5, 20_001)])
def test_the_kernel_finds_what_torch_finds(dtype, shape):
    x = random(*shape, dtype=dtype, gap=16)
    assert torch.equal(row_argmax(x), x.argmax(-1))


@kernel
def test_of_equal_values_the_first_is_taken():
    x = torch.zeros(2, 10_000, device=DEVICE)
    x[0, [17, 5000, 9999]] = 3.0
    x[1, [8191, 8192]] = 2.0
    assert row_argmax(x).tolist() == [17, 8191]


def test_on_a_cpu_it_is_torchs():
    x = torch.randn(4, 30)
    assert torch.equal(row_argmax(x), x.argmax(-1))
