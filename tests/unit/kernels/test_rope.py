"""RoPE's kernels are their references: in place, backward, and after LoRA's addition."""

import pytest
import torch

from adder.kernels import fp8, rope
from kernel_cases import DEVICE, ROUNDING, assert_same_fp8, both_types, kernel, matmul_types, off, random


@kernel
@both_types
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (9, 64), (40, 128), (5, 80)])
def test_rope_kernel_is_its_reference(dtype, heads, size):
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
@pytest.mark.parametrize("rotated", [True, False])
def test_rope_backward_kernel_is_its_reference(dtype, heads, groups, size, rotated):
    """Of gradients as attention leaves them: heads next to each other, or tokens, or with gaps."""
    query = random(26, heads * size, dtype=dtype, gap=64).unflatten(1, (heads, size))
    key = random(groups, 26 * size, dtype=dtype).unflatten(1, (26, size)).transpose(0, 1)
    value = random(26 * groups, size, dtype=dtype).t().contiguous().t().unflatten(0, (26, groups))
    angles = torch.randn(13, size // 2, device=DEVICE).repeat(1, 2)
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else (None, None)
    wide = [None if table is None else table.float() for table in tables]
    exact, _ = rope.rope_backward_reference(tuple(x.float() for x in (query, key, value)), *wide)
    found, rows = rope.rope_backward((query, key, value), *tables, with_fp8=True)
    assert off(found, exact) < ROUNDING[dtype]
    assert_same_fp8(rows, fp8.quantise_reference(found))
    plain, rows = rope.rope_backward((query, key, value), *tables)
    assert rows is None and torch.equal(plain, found)
    if rotated:
        both = plain[:, : (heads + groups) * size].unflatten(1, (-1, size))
        rope.apply_rope(both, *tables)
        assert off(both, torch.cat([query, key], 1).float()) < 2 * ROUNDING[dtype]


@kernel
@matmul_types
@pytest.mark.parametrize(("heads", "rotated", "size"), [(3, 2, 16), (12, 9, 64), (6, 5, 128), (5, 5, 80)])
@pytest.mark.parametrize(("rank", "biased"), [(0, False), (24, True), (104, False)])
def test_lora_and_rope_kernel_is_its_reference(dtype, heads, rotated, size, rank, biased):
    """Two sequences of 39 tokens, more than one tile."""
    y, b = random(78, heads * size, dtype=dtype), random(heads * size, rank, dtype=dtype, gap=8)
    low_rank, bias = random(78, rank, dtype=dtype, gap=5), random(heads * size, dtype=dtype) if biased else None
    angles = torch.randn(39, size // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = y.float()
    rope.add_lora_and_rope_reference(exact, low_rank, b, bias, cos, sin, size, rotated)
    plain = y.float()
    fp8.add_lora_reference(plain, low_rank, b, None, bias)
    rope.add_lora_and_rope(y, low_rank, b, bias, cos, sin, size, rotated)
    assert off(y, exact) < ROUNDING[dtype]
    values = slice(rotated * size, None)
    assert rotated == heads or off(y[:, values], plain[:, values]) < ROUNDING[dtype]
    assert off(exact[:, : rotated * size], plain[:, : rotated * size]) > 0.5
