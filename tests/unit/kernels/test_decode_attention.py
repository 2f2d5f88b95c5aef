"""Attention of single tokens over a KV cache of rows of different lengths."""

import pytest
import torch

from adder.kernels import decode_attention
from kernel_cases import DEVICE, ROUNDING, kernel, matmul_types, off, random

SHAPES = [(5, 8, 2, 64, 200), (3, 4, 4, 128, 70), (2, 9, 3, 80, 130)]  # rows, heads, key-value heads, size, capacity


def case(rows, heads, kv_heads, size, capacity, dtype, device):
    query = torch.randn(rows, heads, size, device=device).to(dtype)
    keys, values = (torch.randn(rows + 1, kv_heads, capacity, size, device=device).to(dtype) for _ in "kv")
    lengths = torch.tensor([1, capacity, 65, capacity // 2, 64][:rows], dtype=torch.int32, device=device)
    return query, keys, values, lengths


def by_torch(query, keys, values, lengths, scale):
    """One row at a time, by torch's own attention in fp32."""
    rows = []
    for number, length in enumerate(lengths.tolist()):
        q, k, v = query[number, :, None].float(), keys[number, :, :length].float(), values[number, :, :length].float()
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=True)[0]
        )
    return torch.stack(rows)[:, :, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_sees_what_it_holds_and_nothing_else(shape):
    torch.manual_seed(0)
    query, keys, values, lengths = case(*shape, torch.float32, "cpu")
    expected = by_torch(query, keys, values, lengths, 0.2)
    for number, length in enumerate(lengths.tolist()):
        keys[number, :, length:] = values[number, :, length:] = 1e4
    found = decode_attention.decode_attention_reference(query, keys, values, lengths, 0.2)
    assert torch.allclose(found, expected, atol=1e-5)


@kernel
@matmul_types
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_its_reference(dtype, shape):
    torch.manual_seed(0)
    query, keys, values, lengths = case(*shape, dtype, DEVICE)
    found = decode_attention.decode_attention(query, keys, values, lengths, 0.2)
    assert off(found, by_torch(query, keys, values, lengths, 0.2)) < 2 * ROUNDING[dtype]


@kernel
def test_in_fp32_the_kernel_is_as_exact_as_fp32_is():
    query, keys, values, lengths = case(*SHAPES[0], torch.float32, DEVICE)
    found = decode_attention.decode_attention(query, keys, values, lengths, 0.2)
    assert off(found, by_torch(query, keys, values, lengths, 0.2)) < 1e-5


@kernel
def test_a_token_is_stored_at_its_rows_position_and_nowhere_else():
    keys, values = (random(4, 2, 9, 24) for _ in "kv")
    before = keys.clone(), values.clone()
    joined = random(3, 8, 24)  # as a matmul gives queries, keys and values
    positions = torch.tensor([0, 8, 3], device=DEVICE)
    decode_attention.store_token(joined[:, 4:6], joined[:, 6:], positions, keys, values)
    decode_attention.store_token_reference(joined[:, 4:6], joined[:, 6:], positions, *before)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_what_it_does_not_compute_is_refused():
    query, keys, values, lengths = case(*SHAPES[0], torch.float32, "cpu")
    mask = lengths.view(-1, 1, 1, 1)
    mixed, _ = decode_attention.attend_to_cache(torch.nn.Identity(), query[:, :, None], keys, values, mask)
    assert mixed.shape == (5, 1, 8, 64)
    for options in ({"sliding_window": 8}, {"softcap": 30.0}, {"s_aux": torch.zeros(8)}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            decode_attention.attend_to_cache(torch.nn.Identity(), query[:, :, None], keys, values, mask, **options)
    with pytest.raises(NotImplementedError):
        decode_attention.attend_to_cache(torch.nn.Identity(), query[:, :, None], keys, values, None)
