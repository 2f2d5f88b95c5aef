"""Causal attention over packed examples as Triton kernels, which share keys and values among grouped heads.

What Dao 2023 (arXiv:2307.08691) does block by block, with two differences that pay for short examples. A block of
queries holds all the query heads of one key-value head: with four of them 128 rows are 32 tokens, so that little of a
short example's blocks lies beyond its end or above the diagonal, and no head's gradient to keys and values is summed up
afterwards. And the blocks are listed once a batch, for all layers, the longest first. No sum is made by atomic
additions: the same input gives the same bits.

Arithmetic is fp32 but for the products' inputs; scores are kept in base 2.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from adder.kernels.triton_utils import Tile, jit, next_power_of_2, tl


def tiles_for(size: int) -> tuple[Tile, Tile, Tile]:
    """Of forward, of the gradient to queries, of that to keys and values, for heads of `size` numbers.

    A tile's rows are a token's query heads one after the other, its columns keys. Of some thirty settings each, those
    that were fast on an H100 for short chats, long documents and single lines.
    """
    if size <= 64:
        return Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 4, 2)
    if size <= 128:
        return Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)
    return Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 2)


class PackedAttention(torch.autograd.Function):
    """(query, key, value, listed, scale, window, cap) to (tokens, heads, head size), contiguous.

    query: (tokens, heads, head size); key, value: (tokens, key-value heads, head size), all 16 bit, the numbers of one
    head next to each other. `listed`: from (rows a token, rows a block, first is longest) to block_list's table, which
    may be kept. `window`: as many tokens a token sees, itself included, or None. `cap`: scores s become
    cap · tanh(s / cap), unless None.
    """

    @staticmethod
    def forward(ctx, query, key, value, listed, scale, window, cap):
        tokens, heads, size = query.shape
        out = torch.empty(tokens, heads, size, dtype=query.dtype, device=query.device)
        sums = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
        tile, *ctx.tiles = tiles_for(size)
        ctx.arguments, ctx.listed = _arguments(query, key, value, scale, window, cap), listed
        table = listed(heads // key.shape[1], tile.block_m, False)
        _launch(_forward, tile, key.shape[1], table, (query, key, value, out, sums), ctx.arguments)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, sums = ctx.saved_tensors
        for_query, for_key = ctx.tiles
        groups = key.shape[1]
        grad = grad.contiguous()
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        shares = torch.empty_like(sums)
        table = ctx.listed(query.shape[1] // groups, for_query.block_m, False)
        tensors = (query, key, value, out, sums, shares, grad, d_query)
        _launch(_to_queries, for_query, groups, table, tensors, ctx.arguments)
        table = ctx.listed(1, for_key.block_n, True)
        tensors = (query, key, value, sums, shares, grad, d_key, d_value)
        _launch(_to_keys, for_key, groups, table, tensors, ctx.arguments)
        return d_query, d_key, d_value, None, None, None, None


def _arguments(query, key, value, scale: float, window: int | None, cap: float | None) -> tuple:
    """What every kernel takes between its tensors and its tile: strides, numbers, and what it is compiled for."""
    heads, size = query.shape[1:]
    strides = (n for x in (query, key, value) for n in x.stride()[:2])
    constants = (heads, heads // key.shape[1], size, next_power_of_2(size), window is not None, cap is not None)
    return *strides, scale, window or 0, cap or 0.0, *constants


def _launch(kernel, tile: Tile, groups: int, table: torch.Tensor, tensors: tuple, arguments: tuple) -> None:
    """A program for each block of `table` and each key-value head."""
    kernel[(len(table), groups)](
        *tensors, table, *arguments, tile.block_m, tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


def block_list(ends: torch.Tensor, tokens: int, rows: int, block: int, first_is_longest: bool) -> torch.Tensor:
    """List the blocks of `block` rows that the examples have, `rows` a token, those with most work first.

    Returns int32 (blocks, 3): where the example begins, its tokens, and the block's number in it; -1 for places that
    are left over, since how many blocks there are isn't known without waiting for the GPU. `first_is_longest`: whether
    the work falls from an example's first block to its last (keys, which later tokens see) or grows.
    """
    lengths = ends.diff()
    counts = (lengths * rows + block - 1) // block
    upto = counts.cumsum(0)
    at = torch.arange(tokens * rows // block + len(lengths), device=ends.device)
    example = torch.bucketize(at, upto, right=True).clamp(max=len(lengths) - 1)
    number = at - (upto - counts)[example]
    work = counts[example] - number if first_is_longest else number
    there = at < upto[-1]
    table = torch.stack([ends[:-1][example], lengths[example], torch.where(there, number, -1)], 1).int()
    return table[torch.where(there, work, -1).argsort(descending=True, stable=True)]


@jit
def _scores(product: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Scores in base 2, from the products of queries and keys; and the slope that a cap gives them."""
    slope = 1.0
    if CAP:
        inner = 2 * tl.sigmoid(2 * product * scale / cap) - 1  # tanh
        slope = 1 - inner * inner
        score = inner * (cap * 1.4426950408889634)
    else:
        score = product * (scale * 1.4426950408889634)
    return score, slope


@jit
def _seen(distance: tl.tensor, window: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """Whether a token sees a key that stands `distance` tokens before it."""
    seen = distance >= 0
    if WINDOW:
        seen = seen & (distance < window)
    return seen


@jit
def _soften(
    product: tl.tensor,
    seen: tl.tensor,
    v: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block of the running softmax: the rows' highest score, the sums of weights and of weighted values."""
    if MASKED or CAP:
        score, _ = _scores(product, scale, cap, CAP)
        if MASKED:
            # After scaling: fused with it, the subtraction below would leave the rounding error of -1e30 · scale.
            score = tl.where(seen, score, -1e30)
        highest = tl.maximum(most, tl.max(score, 1))
        p = tl.exp2(score - highest[:, None])
    else:
        factor = scale * 1.4426950408889634
        highest = tl.maximum(most, tl.max(product, 1) * factor)
        p = tl.exp2(product * factor - highest[:, None])
    fall = tl.exp2(most - highest)
    return highest, total * fall + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * fall[:, None])


@jit
def _forward(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    OUT: tl.tensor,
    SUMS: tl.tensor,
    TABLE: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    group = tl.program_id(1)
    begin = tl.load(TABLE + tile * 3).to(tl.int64)
    length = tl.load(TABLE + tile * 3 + 1)
    block = tl.load(TABLE + tile * 3 + 2)
    if block < 0:
        return
    row = block * BM + tl.arange(0, BM)
    token = row // RATIO
    head = group * RATIO + row % RATIO
    d = tl.arange(0, BD)
    inside = (token < length)[:, None] & (d < D)[None, :]
    q = tl.load(Q + (begin + token)[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    first = block * BM // RATIO
    after = tl.minimum((block * BM + BM - 1) // RATIO + 1, length)
    # Keys up to `whole` are seen by every row, but for a window.
    whole = (first + 1) // BN * BN
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BN * BN
    most = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    key = tl.arange(0, BN)
    k_at = K + begin * k_token + group * k_head + d[:, None]
    v_at = V + begin * v_token + group * v_head + d[None, :]
    for start in range(low, whole, BN):
        at = (start + key).to(tl.int64)
        k = tl.load(k_at + at[None, :] * k_token, mask=(d < D)[:, None], other=0.0)
        v = tl.load(v_at + at[:, None] * v_token, mask=(d < D)[None, :], other=0.0)
        seen = token[:, None] - (start + key)[None, :] < window
        most, total, acc = _soften(tl.dot(q, k), seen, v, most, total, acc, scale, cap, WINDOW, CAP)
    for start in range(tl.maximum(whole, low), after, BN):
        at = (start + key).to(tl.int64)
        there = start + key < length
        k = tl.load(k_at + at[None, :] * k_token, mask=(d < D)[:, None] & there[None, :], other=0.0)
        v = tl.load(v_at + at[:, None] * v_token, mask=(d < D)[None, :] & there[:, None], other=0.0)
        seen = _seen(token[:, None] - (start + key)[None, :], window, WINDOW)
        most, total, acc = _soften(tl.dot(q, k), seen, v, most, total, acc, scale, cap, True, CAP)
    place = (begin + token) * HEADS + head
    tl.store(OUT + place[:, None] * D + d[None, :], acc / total[:, None], mask=inside)
    tl.store(SUMS + place, most + tl.log2(total), mask=token < length)


@jit
def _to_queries(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    OUT: tl.tensor,
    SUMS: tl.tensor,
    SHARES: tl.tensor,
    GRAD: tl.tensor,
    D_QUERY: tl.tensor,
    TABLE: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    # Also writes SHARES, the sum of gradient · output of each row, which the gradient to keys needs next.
    tile = tl.program_id(0)
    group = tl.program_id(1)
    begin = tl.load(TABLE + tile * 3).to(tl.int64)
    length = tl.load(TABLE + tile * 3 + 1)
    block = tl.load(TABLE + tile * 3 + 2)
    if block < 0:
        return
    row = block * BM + tl.arange(0, BM)
    token = row // RATIO
    head = group * RATIO + row % RATIO
    d = tl.arange(0, BD)
    valid = token < length
    inside = valid[:, None] & (d < D)[None, :]
    place = (begin + token) * HEADS + head
    q = tl.load(Q + (begin + token)[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    grad = tl.load(GRAD + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    out = tl.load(OUT + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    share = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(SHARES + place, share, mask=valid)
    sums = tl.load(SUMS + place, mask=valid, other=float("inf"))
    first = block * BM // RATIO
    after = tl.minimum((block * BM + BM - 1) // RATIO + 1, length)
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BN * BN
    acc = tl.zeros([BM, BD], tl.float32)
    key = tl.arange(0, BN)
    k_at = K + begin * k_token + group * k_head + d[None, :]
    v_at = V + begin * v_token + group * v_head + d[:, None]
    for start in range(low, after, BN):
        at = (start + key).to(tl.int64)
        there = start + key < length
        k = tl.load(k_at + at[:, None] * k_token, mask=(d < D)[None, :] & there[:, None], other=0.0)
        v = tl.load(v_at + at[None, :] * v_token, mask=(d < D)[:, None] & there[None, :], other=0.0)
        score, slope = _scores(tl.dot(q, tl.trans(k)), scale, cap, CAP)
        seen = _seen(token[:, None] - (start + key)[None, :], window, WINDOW)
        p = tl.where(seen, tl.exp2(score - sums[:, None]), 0.0)
        to_score = p * (tl.dot(grad, v) - share[:, None]) * slope
        acc = tl.dot(to_score.to(k.dtype), k, acc)
    tl.store(D_QUERY + place[:, None] * D + d[None, :], acc * scale, mask=inside)


@jit
def _to_keys(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    SUMS: tl.tensor,
    SHARES: tl.tensor,
    GRAD: tl.tensor,
    D_KEY: tl.tensor,
    D_VALUE: tl.tensor,
    TABLE: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    group = tl.program_id(1)
    begin = tl.load(TABLE + tile * 3).to(tl.int64)
    length = tl.load(TABLE + tile * 3 + 1)
    block = tl.load(TABLE + tile * 3 + 2)
    if block < 0:
        return
    key = block * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = (key < length)[:, None] & (d < D)[None, :]
    k = tl.load(K + (begin + key)[:, None] * k_token + group * k_head + d[None, :], mask=inside, other=0.0)
    v = tl.load(V + (begin + key)[:, None] * v_token + group * v_head + d[None, :], mask=inside, other=0.0)
    d_key = tl.zeros([BN, BD], tl.float32)
    d_value = tl.zeros([BN, BD], tl.float32)
    low = block * BN * RATIO
    high = length * RATIO
    if WINDOW:
        high = tl.minimum(high, (block * BN + BN + window - 1) * RATIO)
    for start in range(low, high, BM):
        row = start + tl.arange(0, BM)
        token = row // RATIO
        head = group * RATIO + row % RATIO
        valid = token < length
        there = valid[:, None] & (d < D)[None, :]
        place = (begin + token) * HEADS + head
        q = tl.load(Q + (begin + token)[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=there, other=0.0)
        grad = tl.load(GRAD + place[:, None] * D + d[None, :], mask=there, other=0.0)
        sums = tl.load(SUMS + place, mask=valid, other=float("inf"))
        share = tl.load(SHARES + place, mask=valid, other=0.0)
        score, slope = _scores(tl.dot(k, tl.trans(q)), scale, cap, CAP)
        seen = _seen(token[None, :] - key[:, None], window, WINDOW)
        p = tl.where(seen, tl.exp2(score - sums[None, :]), 0.0)
        d_value = tl.dot(p.to(grad.dtype), grad, d_value)
        to_score = p * (tl.dot(v, tl.trans(grad)) - share[None, :]) * slope
        d_key = tl.dot(to_score.to(q.dtype), q, d_key)
    place = ((begin + key) * (HEADS // RATIO) + group)[:, None] * D + d[None, :]
    tl.store(D_KEY + place, d_key * scale, mask=inside)
    tl.store(D_VALUE + place, d_value, mask=inside)
