"""Attention of one new token a row over a KV cache whose rows are of different lengths, as Triton kernels.

A decoding step reads the whole KV cache once, so a program reads the keys and values of one row and key-value head for
all query heads that share them. Arithmetic is fp32; matrix products of 16-bit tensors accumulate in fp32. No length is
known to the host, so that a step can be replayed as a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from adder.kernels import tiles
from adder.kernels.triton_utils import jit, next_power_of_2, runs_kernels, tl

LOG2_E = 1.4426950408889634


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend each row's query to its first `lengths` keys; return (rows, heads, size), contiguous.

    query: (rows, heads, size), the values of a head next to each other. keys, values: (at least rows, key-value heads,
    capacity, size), contiguous. lengths: int32 (rows,), contiguous, at least 1.
    """
    if not runs_kernels(query, "decode_attention"):
        return decode_attention_reference(query, keys, values, lengths, scale)
    rows, heads, size = query.shape
    kv_heads = keys.shape[1]
    out = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    tile = tiles.decode_attention_tile(tiles.card_of(query.device), size, query.element_size())
    _decode_attention[(rows, kv_heads)](
        query,
        query.stride(0),
        query.stride(1),
        keys,
        values,
        keys.stride(0),
        keys.stride(1),
        lengths,
        out,
        scale * LOG2_E,
        heads // kv_heads,
        size,
        next_power_of_2(heads // kv_heads),
        next_power_of_2(size),
        tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def decode_attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """As decode_attention."""
    rows, heads, size = query.shape
    kv_heads, capacity = keys.shape[1:3]
    grouped = query.float().view(rows, kv_heads, heads // kv_heads, size)
    scores = grouped @ keys[:rows].float().transpose(-1, -2) * scale
    seen = torch.arange(capacity, device=query.device) < lengths[:, None, None, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ values[:rows].float()).reshape(rows, heads, size).to(query.dtype)


def store_token(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write each row's key and value, (rows, key-value heads, size), to its position in `keys` and `values`.

    keys, values: as decode_attention takes them. positions: int64 (rows,), contiguous, below the capacity.
    """
    if not runs_kernels(key, "decode_attention"):
        return store_token_reference(key, value, positions, keys, values)
    rows, kv_heads, size = key.shape
    _store_token[(rows, kv_heads)](
        key,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        value,
        value.stride(0),
        value.stride(1),
        value.stride(2),
        positions,
        keys,
        values,
        keys.stride(0),
        keys.stride(1),
        size,
        next_power_of_2(size),
        num_warps=1,
    )


def store_token_reference(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """As store_token."""
    rows = torch.arange(len(key), device=key.device)
    keys[rows, :, positions] = key
    values[rows, :, positions] = value


def attend_to_cache(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """decode_attention as transformers calls attention: query (rows, heads, 1, size) to (rows, 1, heads, size).

    key, value: the whole KV cache. attention_mask: in the mask's place, each row's length, int32 (rows, 1, 1, 1): of
    four dimensions, since transformers hands such a mask on as it is. Raises NotImplementedError for what
    decode_attention doesn't compute: a window, capped scores, sinks, another bias.
    """
    asked = {"sliding_window", "softcap", "s_aux", "position_bias", "head_mask"}
    found = sorted(name for name in asked & options.keys() if options[name] is not None)
    if found or attention_mask is None or query.shape[2] != 1 or query.shape[-1] != value.shape[-1]:
        raise NotImplementedError(f"decoding with {', '.join(found) or 'such shapes'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = decode_attention(query[:, :, 0], key, value, attention_mask.view(-1), scale)
    return mixed[:, None], None


@jit
def _decode_attention(
    Q: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    KEYS: tl.tensor,
    VALUES: tl.tensor,
    kv_row: tl.tensor,
    kv_head: tl.tensor,
    LENGTHS: tl.tensor,
    OUT: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1)
    member = tl.arange(0, BLOCK_GROUP)
    column = tl.arange(0, BLOCK_SIZE)
    head = own * GROUP + member
    used = (member[:, None] < GROUP) & (column[None, :] < SIZE)
    q = tl.load(Q + row * q_row + head[:, None] * q_head + column[None, :], mask=used, other=0.0)
    base = row * kv_row + own * kv_head
    length = tl.load(LENGTHS + row)
    highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_SIZE], tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = (token[:, None] < length) & (column[None, :] < SIZE)
        k = tl.load(KEYS + base + token[:, None] * SIZE + column[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(token[None, :] < length, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(VALUES + base + token[:, None] * SIZE + column[None, :], mask=there, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = new
    mixed = mixed / total[:, None]
    heads = tl.num_programs(1) * GROUP
    tl.store(OUT + (row * heads + head[:, None]) * SIZE + column[None, :], mixed, mask=used)


@jit
def _store_token(
    K: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    k_size: tl.tensor,
    V: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    v_size: tl.tensor,
    POSITIONS: tl.tensor,
    KEYS: tl.tensor,
    VALUES: tl.tensor,
    kv_row: tl.tensor,
    kv_head: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_SIZE)
    inside = column < SIZE
    position = tl.load(POSITIONS + row)
    target = row * kv_row + head * kv_head + position * SIZE + column
    key = tl.load(K + row * k_row + head * k_head + column * k_size, mask=inside)
    tl.store(KEYS + target, key, mask=inside)
    value = tl.load(V + row * v_row + head * v_head + column * v_size, mask=inside)
    tl.store(VALUES + target, value, mask=inside)
