"""The rotary position embedding as Triton kernels that turn queries and keys in place."""

from __future__ import annotations

import torch

from adder.fp8 import add_low_rank_reference
from adder.triton_tools import jit, runs_kernels, tl, triton, width_of

# Tokens and warps of a program of add_low_rank_and_rotate, which has one head.
TOKENS, WARPS = 64, 4


def rotate(
    source: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, inverse: bool = False
) -> None:
    """Turn each head by its position's angles into `out`; back by them with `inverse`. `out` may be `source`.

    source, out: (tokens, heads, head size), the numbers of one head next to each other. cos, sin: (period, head size),
    contiguous, both halves of a row alike (transformers' rotary embedding); token t takes row t modulo period.
    """
    if not runs_kernels(source):
        return rotate_reference(source, cos, sin, out, inverse)
    rows, heads, size = source.shape
    grid = (rows,)
    _rotate[grid](
        source,
        source.stride(0),
        source.stride(1),
        out,
        out.stride(0),
        out.stride(1),
        cos,
        sin,
        cos.shape[0],
        heads,
        size // 2,
        inverse,
        width_of(heads, 1),
        width_of(size // 2, 1),
        num_warps=4 if heads * size > 1024 else 2,
    )


def rotate_reference(source, cos, sin, out, inverse=False):
    """As rotate."""
    repeat = source.shape[0] // cos.shape[0]
    c, s = (table.float().repeat(repeat, 1).chunk(2, -1)[0][:, None] for table in (cos, sin))
    s = -s if inverse else s
    a, b = source.float().chunk(2, -1)
    out.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))


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
    rotate_reference(heads, cos, sin, heads)
    y.copy_(total)


@jit
def _rotate(
    SOURCE,
    source_row,
    source_head,
    OUT,
    out_row,
    out_head,
    COS,
    SIN,
    period,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
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
    if INVERSE:
        s = -s
    source_at = SOURCE + row * source_row + head * source_head + column
    out_at = OUT + row * out_row + head * out_head + column
    a = tl.load(source_at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source_at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, a * c - b * s, mask=inside)
    tl.store(out_at + HALF, b * c + a * s, mask=inside)


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
