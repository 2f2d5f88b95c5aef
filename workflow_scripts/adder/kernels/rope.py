"""The rotary position embedding as Triton kernels: turn queries and keys in place, turn their gradients back."""

from __future__ import annotations

import torch

from adder.kernels.fp8 import Fp8Rows, add_low_rank_reference, empty_rows, fp8_scale, quantise_reference
from adder.kernels.triton_utils import jit, runs_kernels, tl, triton, width_of

# Tokens and warps of a program of add_low_rank_and_rotate, which has one head.
TOKENS, WARPS = 64, 4


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn each head by its position's angles, in place.

    heads: (tokens, heads, head size), the numbers of one head next to each other. cos, sin: (period, head size),
    contiguous, both halves of a row alike (transformers' rotary embedding); token t takes row t modulo period.
    """
    if not runs_kernels(heads):
        return rotate_reference(heads, cos, sin)
    rows, count, size = heads.shape
    _rotate[(rows,)](
        heads,
        heads.stride(0),
        heads.stride(1),
        cos,
        sin,
        cos.shape[0],
        count,
        size // 2,
        width_of(count, 1),
        width_of(size // 2, 1),
        num_warps=4 if count * size > 1024 else 2,
    )


def rotate_reference(heads, cos, sin):
    """As rotate."""
    repeat = heads.shape[0] // cos.shape[0]
    c, s = (table.float().repeat(repeat, 1).chunk(2, -1)[0][:, None] for table in (cos, sin))
    a, b = heads.float().chunk(2, -1)
    heads.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))


def turn_back(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    quantised: bool = False,
) -> tuple[torch.Tensor, Fp8Rows | None]:
    """Join the gradients to queries, keys and values, the first two turned back; with `quantised` in fp8 as well.

    grads: each (tokens, heads, head size). cos, sin: as rotate has them; None where nothing was turned. Returns
    (tokens, all heads · head size), contiguous.
    """
    if not runs_kernels(grads[0]):
        return turn_back_reference(grads, cos, sin, quantised)
    grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
    rows, _, size = grads[0].shape
    counts = [grad.shape[1] for grad in grads]
    result = torch.empty(rows, sum(counts) * size, dtype=grads[0].dtype, device=grads[0].device)
    in_fp8 = empty_rows(*result.shape, result.device) if quantised else None
    table = result if cos is None else cos
    _turn_back[(rows,)](
        *(item for grad in grads for item in (grad, grad.stride(0), grad.stride(1))),
        result,
        in_fp8.values if quantised else result,
        in_fp8.scales if quantised else result,
        table,
        table if sin is None else sin,
        table.shape[0],
        *counts,
        size // 2,
        cos is not None,
        quantised,
        *(width_of(count, 1) for count in counts),
        width_of(size // 2, 1),
        num_warps=4,
    )
    return result, in_fp8


def turn_back_reference(grads, cos, sin, quantised=False):
    """As turn_back."""
    result = torch.cat(grads, 1)
    if cos is not None:
        rotate_reference(result[:, : -grads[2].shape[1]], cos, -sin)
    result = result.flatten(1)
    return result, quantise_reference(result) if quantised else None


def add_low_rank_and_rotate(
    y: torch.Tensor,
    low_rank: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    size: int,
    turned: int,
) -> None:
    """Add low_rank · bᵀ and `bias` to y in place and turn its first `turned` heads, in one pass and with one rounding.

    y: (tokens, N) contiguous, heads of `size` numbers: queries, keys, values. low_rank, b, bias: as fp8.add_low_rank
    has them. cos, sin: as rotate has them.
    """
    if not runs_kernels(y):
        return add_low_rank_and_rotate_reference(y, low_rank, b, bias, cos, sin, size, turned)
    (rows, width), rank = y.shape, b.shape[1]
    _add_low_rank_and_rotate[(triton.cdiv(rows, TOKENS), width // size)](
        y,
        low_rank,
        low_rank.stride(0),
        b,
        b.stride(0),
        y if bias is None else bias,
        cos,
        sin,
        cos.shape[0],
        rows,
        width,
        rank,
        turned,
        size // 2,
        bias is not None,
        TOKENS,
        width_of(size // 2),
        min(64, width_of(rank)) if rank else 16,
        num_warps=WARPS,
        num_stages=1,  # most loops over ranks have one round
    )


def add_low_rank_and_rotate_reference(y, low_rank, b, bias, cos, sin, size, turned):
    """As add_low_rank_and_rotate."""
    total = y.float()
    add_low_rank_reference(total, low_rank, b, None, bias)
    heads = total.unflatten(1, (-1, size))[:, :turned]
    rotate_reference(heads, cos, sin)
    y.copy_(total)


@jit
def _rotate(
    X,
    x_row,
    x_head,
    COS,
    SIN,
    period,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BH)[:, None]
    column = tl.arange(0, BN)[None, :]
    inside = (head < HEADS) & (column < HALF)
    table = (row % period) * 2 * HALF + column
    c = tl.load(COS + table, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(SIN + table, mask=column < HALF, other=0.0).to(tl.float32)
    at = X + row * x_row + head * x_head + column
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, a * c - b * s, mask=inside)
    tl.store(at + HALF, b * c + a * s, mask=inside)


@jit
def _turned(SOURCE, at, c, s, HEADS: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    """Both halves of all heads of a token, turned back by angles with these cosines and sines, rounded."""
    column = tl.arange(0, BN)[None, :]
    inside = (tl.arange(0, BH)[:, None] < HEADS) & (column < HALF)
    a = tl.load(SOURCE + at + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(SOURCE + at + HALF + column, mask=inside, other=0.0).to(tl.float32)
    kind = SOURCE.dtype.element_ty
    return (a * c + b * s).to(kind), (b * c - a * s).to(kind)


@jit
def _largest(a, b):
    return tl.max(tl.max(tl.maximum(tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32))), 1), 0)


@jit
def _put(OUT, start, a, b, HEADS: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    """Store both halves of heads that lie one behind the other from `start` on."""
    head = tl.arange(0, BH)[:, None]
    column = tl.arange(0, BN)[None, :]
    inside = (head < HEADS) & (column < HALF)
    at = OUT + start + head * 2 * HALF + column
    tl.store(at, a, mask=inside)
    tl.store(at + HALF, b, mask=inside)


@jit
def _turn_back(
    QUERY,
    q_row,
    q_head,
    KEY,
    k_row,
    k_head,
    VALUE,
    v_row,
    v_head,
    OUT,
    VALUES,
    SCALES,
    COS,
    SIN,
    period,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    QUANTISED: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    # A program has one token.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BN)[None, :]
    c = tl.full([1, BN], 1.0, tl.float32)
    s = tl.zeros([1, BN], tl.float32)
    if TURNED:
        table = (row % period) * 2 * HALF + column
        c = tl.load(COS + table, mask=column < HALF, other=0.0).to(tl.float32)
        s = tl.load(SIN + table, mask=column < HALF, other=0.0).to(tl.float32)
    q_a, q_b = _turned(QUERY, row * q_row + tl.arange(0, BQ)[:, None] * q_head, c, s, NQ, HALF, BQ, BN)
    k_a, k_b = _turned(KEY, row * k_row + tl.arange(0, BK)[:, None] * k_head, c, s, NK, HALF, BK, BN)
    v_a, v_b = _turned(VALUE, row * v_row + tl.arange(0, BV)[:, None] * v_head, 1.0, 0.0, NV, HALF, BV, BN)
    start = row * (NQ + NK + NV) * 2 * HALF
    k_start = start + NQ * 2 * HALF
    v_start = k_start + NK * 2 * HALF
    _put(OUT, start, q_a, q_b, NQ, HALF, BQ, BN)
    _put(OUT, k_start, k_a, k_b, NK, HALF, BK, BN)
    _put(OUT, v_start, v_a, v_b, NV, HALF, BV, BN)
    if QUANTISED:
        scale = fp8_scale(tl.maximum(_largest(q_a, q_b), tl.maximum(_largest(k_a, k_b), _largest(v_a, v_b))))
        tl.store(SCALES + row, scale)
        _put(VALUES, start, _in_fp8(q_a, scale), _in_fp8(q_b, scale), NQ, HALF, BQ, BN)
        _put(VALUES, k_start, _in_fp8(k_a, scale), _in_fp8(k_b, scale), NK, HALF, BK, BN)
        _put(VALUES, v_start, _in_fp8(v_a, scale), _in_fp8(v_b, scale), NV, HALF, BV, BN)


@jit
def _in_fp8(x, scale):
    return (x.to(tl.float32) / scale).to(tl.float8e4nv)


@jit
def _add_low_rank_and_rotate(
    Y,
    LOW,
    low_stride,
    B,
    b_stride,
    BIAS,
    COS,
    SIN,
    period,
    rows,
    N,
    RANK,
    turned,
    HALF: tl.constexpr,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    # A program has some tokens of one head, in two halves.
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    head = tl.program_id(1)
    column = tl.arange(0, BN)[None, :]
    output = head * 2 * HALF + column
    long_row = row.to(tl.int64)
    inside = (row < rows) & (column < HALF)
    at = long_row * N + output
    first = tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(Y + at + HALF, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, RANK, BR):
        across = start + tl.arange(0, BR)[None, :]
        down = start + tl.arange(0, BR)[:, None]
        low = tl.load(LOW + long_row * low_stride + across, mask=(row < rows) & (across < RANK), other=0.0)
        b_mask = (column < HALF) & (down < RANK)
        b_at = output.to(tl.int64) * b_stride + down
        first = tl.dot(low, tl.load(B + b_at, mask=b_mask, other=0.0), first)
        second = tl.dot(low, tl.load(B + b_at + HALF * b_stride, mask=b_mask, other=0.0), second)
    if BIASED:
        first += tl.load(BIAS + output, mask=column < HALF, other=0.0).to(tl.float32)
        second += tl.load(BIAS + output + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    # Values are turned by no angle: cos 1, sin 0.
    turns = inside & (head < turned)
    table = (row % period).to(tl.int64) * 2 * HALF + column
    c = tl.load(COS + table, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(SIN + table, mask=turns, other=0.0).to(tl.float32)
    tl.store(Y + at, first * c - second * s, mask=inside)
    tl.store(Y + at + HALF, second * c + first * s, mask=inside)
