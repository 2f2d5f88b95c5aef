"""The rotary position embedding as a Triton kernel that turns queries and keys in place."""

from __future__ import annotations

import torch

from adder.triton_tools import jit, runs_kernels, tl, width_of


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
