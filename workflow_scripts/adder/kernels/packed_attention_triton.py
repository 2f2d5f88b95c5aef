"""FlashAttention over packed examples as Triton kernels: causal, with grouped-query heads, windows and capped scores.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) with two differences that pay for short examples. A block of queries holds
all the query heads of one key-value head: with four of them 128 rows are 32 tokens, so that little of a short example's
blocks lies beyond its end or above the diagonal, and no head's gradient to keys and values is summed up afterwards. And
the blocks are scheduled once a batch, for all layers, the longest first. No sum is made by atomic additions: the same
input gives the same bits.

As there, forward keeps of each row of scores the log-sum-exp (LSE), from which backward computes the softmax anew, and
backward the sum of gradient · output (DELTA). Arithmetic is fp32 but for the matmuls' inputs; scores are in base 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adder.kernels import tiles
from adder.kernels.tiles import Tile
from adder.kernels.triton_utils import jit, next_power_of_2, tl


class PackedAttention(torch.autograd.Function):
    """(query, key, value, schedule, scale, window, cap) to (tokens, heads, head size), contiguous.

    query: (tokens, heads, head size); key, value: (tokens, key-value heads, head size), all 16 bit, the values of one
    head next to each other. `schedule`: from (rows a token, rows a block, first is longest) to block_schedule's table,
    which may be kept. `window`: as many tokens a token sees, itself included, or None. `cap`: scores s become
    cap · tanh(s / cap), unless None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        schedule: Callable[[int, int, bool], torch.Tensor],
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> torch.Tensor:
        """Give the attention's output; keep the log-sum-exps."""
        tokens, heads, size = query.shape
        out = torch.empty(tokens, heads, size, dtype=query.dtype, device=query.device)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
        tile, *ctx.tiles = tiles.attention_tiles(tiles.card_of(query.device), size)
        ctx.arguments, ctx.schedule = _kernel_arguments(query, key, value, scale, window, cap), schedule
        table = schedule(heads // key.shape[1], tile.block_m, False)
        _launch(_attention_forward, tile, key.shape[1], table, (query, key, value, out, lse), ctx.arguments)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients to query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        dq_tile, dkdv_tile = ctx.tiles
        kv_heads = key.shape[1]
        grad = grad.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        delta = torch.empty_like(lse)
        table = ctx.schedule(query.shape[1] // kv_heads, dq_tile.block_m, False)
        tensors = (query, key, value, out, lse, delta, grad, dq)
        _launch(_backward_dq, dq_tile, kv_heads, table, tensors, ctx.arguments)
        table = ctx.schedule(1, dkdv_tile.block_n, True)
        tensors = (query, key, value, lse, delta, grad, dk, dv)
        _launch(_backward_dkdv, dkdv_tile, kv_heads, table, tensors, ctx.arguments)
        return dq, dk, dv, None, None, None, None


def _kernel_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[int | float | bool, ...]:
    """What every kernel takes between its tensors and its tile: strides, scalars, and what it is compiled for."""
    heads, size = query.shape[1:]
    strides = (n for x in (query, key, value) for n in x.stride()[:2])
    constants = (heads, heads // key.shape[1], size, next_power_of_2(size), window is not None, cap is not None)
    return *strides, scale, window or 0, cap or 0.0, *constants


def _launch(
    kernel: Any,
    tile: Tile,
    kv_heads: int,
    table: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    arguments: tuple[int | float | bool, ...],
) -> None:
    """A program for each block of `table` and each key-value head."""
    kernel[(len(table), kv_heads)](
        *tensors, table, *arguments, tile.block_m, tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


def block_schedule(
    cu_seq_lens: torch.Tensor, tokens: int, rows_per_token: int, block_rows: int, first_is_longest: bool
) -> torch.Tensor:
    """List the blocks of rows that the examples have, `rows_per_token` rows a token, those with most work first.

    cu_seq_lens: int32 (examples + 1,), where each example begins, and the end. Returns int32 (blocks, 3): where the
    example begins, its tokens, and the block's index in it; -1 for places that are left over, since how many blocks
    there are isn't known without waiting for the GPU. `first_is_longest`: whether the work falls from an example's
    first block to its last (keys, which later tokens see) or grows.
    """
    lengths = cu_seq_lens.diff()
    counts = (lengths * rows_per_token + block_rows - 1) // block_rows
    cu_blocks = counts.cumsum(0)
    place = torch.arange(tokens * rows_per_token // block_rows + len(lengths), device=cu_seq_lens.device)
    example = torch.bucketize(place, cu_blocks, right=True).clamp(max=len(lengths) - 1)
    index = place - (cu_blocks - counts)[example]
    work = counts[example] - index if first_is_longest else index
    exists = place < cu_blocks[-1]
    table = torch.stack([cu_seq_lens[:-1][example], lengths[example], torch.where(exists, index, -1)], 1).int()
    return table[torch.where(exists, work, -1).argsort(descending=True, stable=True)]


@jit
def _capped_scores(qk: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Scores in base 2, from queries · keys; and the slope that a cap gives them."""
    slope = 1.0
    if CAP:
        inner = 2 * tl.sigmoid(2 * qk * scale / cap) - 1  # tanh
        slope = 1 - inner * inner
        score = inner * (cap * 1.4426950408889634)
    else:
        score = qk * (scale * 1.4426950408889634)
    return score, slope


@jit
def _is_visible(distance: tl.tensor, window: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """Whether a token sees a key that stands `distance` tokens before it."""
    visible = distance >= 0
    if WINDOW:
        visible = visible & (distance < window)
    return visible


@jit
def _online_softmax_step(
    qk: tl.tensor,
    visible: tl.tensor,
    v: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    acc: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over one more block of keys: the rows' highest score, and the sums of weights and of values."""
    if MASKED or CAP:
        score, _ = _capped_scores(qk, scale, cap, CAP)
        if MASKED:
            # After scaling: fused with it, the subtraction below would leave the rounding error of -1e30 · scale.
            score = tl.where(visible, score, -1e30)
        new_max = tl.maximum(row_max, tl.max(score, 1))
        p = tl.exp2(score - new_max[:, None])
    else:
        factor = scale * 1.4426950408889634
        new_max = tl.maximum(row_max, tl.max(qk, 1) * factor)
        p = tl.exp2(qk * factor - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    return new_max, row_sum * rescale + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * rescale[:, None])


@jit
def _attention_forward(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    OUT: tl.tensor,
    LSE: tl.tensor,
    TABLE: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    begin = tl.load(TABLE + tile * 3).to(tl.int64)
    length = tl.load(TABLE + tile * 3 + 1)
    block = tl.load(TABLE + tile * 3 + 2)
    if block < 0:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    d = tl.arange(0, BLOCK_D)
    out_mask = (token < length)[:, None] & (d < HEAD_SIZE)[None, :]
    q = tl.load(
        Q + (begin + token)[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :],
        mask=out_mask,
        other=0.0,
    )
    first_token = block * BLOCK_M // HEADS_PER_KV
    end = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // HEADS_PER_KV + 1, length)
    # Keys up to unmasked_end are seen by every row, but for a window.
    unmasked_end = (first_token + 1) // BLOCK_N * BLOCK_N
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(first_token - window + 1, 0) // BLOCK_N * BLOCK_N
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = tl.arange(0, BLOCK_N)
    k_at = K + begin * k_token_stride + kv_head * k_head_stride + d[:, None]
    v_at = V + begin * v_token_stride + kv_head * v_head_stride + d[None, :]
    for start in range(first_key, unmasked_end, BLOCK_N):
        at = (start + key).to(tl.int64)
        k = tl.load(k_at + at[None, :] * k_token_stride, mask=(d < HEAD_SIZE)[:, None], other=0.0)
        v = tl.load(v_at + at[:, None] * v_token_stride, mask=(d < HEAD_SIZE)[None, :], other=0.0)
        visible = token[:, None] - (start + key)[None, :] < window
        row_max, row_sum, acc = _online_softmax_step(
            tl.dot(q, k), visible, v, row_max, row_sum, acc, scale, cap, WINDOW, CAP
        )
    for start in range(tl.maximum(unmasked_end, first_key), end, BLOCK_N):
        at = (start + key).to(tl.int64)
        mask = start + key < length
        k = tl.load(k_at + at[None, :] * k_token_stride, mask=(d < HEAD_SIZE)[:, None] & mask[None, :], other=0.0)
        v = tl.load(v_at + at[:, None] * v_token_stride, mask=(d < HEAD_SIZE)[None, :] & mask[:, None], other=0.0)
        visible = _is_visible(token[:, None] - (start + key)[None, :], window, WINDOW)
        row_max, row_sum, acc = _online_softmax_step(
            tl.dot(q, k), visible, v, row_max, row_sum, acc, scale, cap, True, CAP
        )
    token_head = (begin + token) * HEADS + head
    tl.store(OUT + token_head[:, None] * HEAD_SIZE + d[None, :], acc / row_sum[:, None], mask=out_mask)
    tl.store(LSE + token_head, row_max + tl.log2(row_sum), mask=token < length)


@jit
def _backward_dq(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    OUT: tl.tensor,
    LSE: tl.tensor,
    DELTA: tl.tensor,
    GRAD: tl.tensor,
    DQ: tl.tensor,
    TABLE: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    # Also writes DELTA, the sum of gradient · output of each row, which the gradient to keys needs next.
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    begin = tl.load(TABLE + tile * 3).to(tl.int64)
    length = tl.load(TABLE + tile * 3 + 1)
    block = tl.load(TABLE + tile * 3 + 2)
    if block < 0:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    d = tl.arange(0, BLOCK_D)
    valid = token < length
    out_mask = valid[:, None] & (d < HEAD_SIZE)[None, :]
    token_head = (begin + token) * HEADS + head
    q = tl.load(
        Q + (begin + token)[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :],
        mask=out_mask,
        other=0.0,
    )
    grad = tl.load(GRAD + token_head[:, None] * HEAD_SIZE + d[None, :], mask=out_mask, other=0.0)
    out = tl.load(OUT + token_head[:, None] * HEAD_SIZE + d[None, :], mask=out_mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DELTA + token_head, delta, mask=valid)
    lse = tl.load(LSE + token_head, mask=valid, other=float("inf"))
    first_token = block * BLOCK_M // HEADS_PER_KV
    end = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // HEADS_PER_KV + 1, length)
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(first_token - window + 1, 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = tl.arange(0, BLOCK_N)
    k_at = K + begin * k_token_stride + kv_head * k_head_stride + d[None, :]
    v_at = V + begin * v_token_stride + kv_head * v_head_stride + d[:, None]
    for start in range(first_key, end, BLOCK_N):
        at = (start + key).to(tl.int64)
        mask = start + key < length
        k = tl.load(k_at + at[:, None] * k_token_stride, mask=(d < HEAD_SIZE)[None, :] & mask[:, None], other=0.0)
        v = tl.load(v_at + at[None, :] * v_token_stride, mask=(d < HEAD_SIZE)[:, None] & mask[None, :], other=0.0)
        score, slope = _capped_scores(tl.dot(q, tl.trans(k)), scale, cap, CAP)
        visible = _is_visible(token[:, None] - (start + key)[None, :], window, WINDOW)
        p = tl.where(visible, tl.exp2(score - lse[:, None]), 0.0)
        ds = p * (tl.dot(grad, v) - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(DQ + token_head[:, None] * HEAD_SIZE + d[None, :], dq * scale, mask=out_mask)


@jit
def _backward_dkdv(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    LSE: tl.tensor,
    DELTA: tl.tensor,
    GRAD: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    TABLE: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    begin = tl.load(TABLE + tile * 3).to(tl.int64)
    length = tl.load(TABLE + tile * 3 + 1)
    block = tl.load(TABLE + tile * 3 + 2)
    if block < 0:
        return
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    out_mask = (key < length)[:, None] & (d < HEAD_SIZE)[None, :]
    k = tl.load(
        K + (begin + key)[:, None] * k_token_stride + kv_head * k_head_stride + d[None, :], mask=out_mask, other=0.0
    )
    v = tl.load(
        V + (begin + key)[:, None] * v_token_stride + kv_head * v_head_stride + d[None, :], mask=out_mask, other=0.0
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    low = block * BLOCK_N * HEADS_PER_KV
    high = length * HEADS_PER_KV
    if WINDOW:
        high = tl.minimum(high, (block * BLOCK_N + BLOCK_N + window - 1) * HEADS_PER_KV)
    for start in range(low, high, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        token = row // HEADS_PER_KV
        head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
        valid = token < length
        mask = valid[:, None] & (d < HEAD_SIZE)[None, :]
        token_head = (begin + token) * HEADS + head
        q = tl.load(
            Q + (begin + token)[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :],
            mask=mask,
            other=0.0,
        )
        grad = tl.load(GRAD + token_head[:, None] * HEAD_SIZE + d[None, :], mask=mask, other=0.0)
        lse = tl.load(LSE + token_head, mask=valid, other=float("inf"))
        delta = tl.load(DELTA + token_head, mask=valid, other=0.0)
        score, slope = _capped_scores(tl.dot(k, tl.trans(q)), scale, cap, CAP)
        visible = _is_visible(token[None, :] - key[:, None], window, WINDOW)
        p = tl.where(visible, tl.exp2(score - lse[None, :]), 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        ds = p * (tl.dot(v, tl.trans(grad)) - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk)
    token_head = ((begin + key) * (HEADS // HEADS_PER_KV) + kv_head)[:, None] * HEAD_SIZE + d[None, :]
    tl.store(DK + token_head, dk * scale, mask=out_mask)
    tl.store(DV + token_head, dv, mask=out_mask)
