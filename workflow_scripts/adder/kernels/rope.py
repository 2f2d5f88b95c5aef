"""RoPE, the rotary position embedding (Su et al. 2021, arXiv:2104.09864), as Triton kernels.

Queries and keys are rotated in place by their positions' angles, in the layout of Llama in transformers: element i of a
head's first half and of its second one form a pair. Their gradients are rotated back by the same angles.
"""

from __future__ import annotations

import torch

from adder.kernels import tiles
from adder.kernels.fp8 import RowwiseFp8, add_lora_reference, empty_fp8, quantise_reference, scale_of_amax
from adder.kernels.triton_utils import jit, next_power_of_2, runs_kernels, tl, triton


def apply_rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate each head by its position's angles, in place.

    heads: (tokens, heads, head size), the values of one head next to each other. cos, sin: (period, head size),
    contiguous, both halves of a row alike (transformers' rotary embedding); token t takes row t modulo period.
    """
    if not runs_kernels(heads, "rope"):
        return apply_rope_reference(heads, cos, sin)
    rows, count, size = heads.shape
    _apply_rope[(rows,)](
        heads,
        heads.stride(0),
        heads.stride(1),
        cos,
        sin,
        cos.shape[0],
        count,
        size // 2,
        next_power_of_2(count, 1),
        next_power_of_2(size // 2, 1),
        num_warps=4 if count * size > 1024 else 2,
    )


def rope_table(angles: torch.Tensor) -> torch.Tensor:
    """Cosines or sines of transformers' rotary embedding, (batch, tokens, head size), as apply_rope takes them."""
    return angles.reshape(-1, angles.shape[-1]).contiguous()


def apply_rope_reference(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As apply_rope."""
    repeat = heads.shape[0] // cos.shape[0]
    c, s = (table.float().repeat(repeat, 1).chunk(2, -1)[0][:, None] for table in (cos, sin))
    a, b = heads.float().chunk(2, -1)
    heads.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))


def rope_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    with_fp8: bool = False,
) -> tuple[torch.Tensor, RowwiseFp8 | None]:
    """Join the gradients to queries, keys and values, the first two rotated back; with `with_fp8` in fp8 as well.

    grads: each (tokens, heads, head size). cos, sin: as apply_rope has them; None where nothing was rotated. Returns
    (tokens, all heads · head size), contiguous.
    """
    if not runs_kernels(grads[0], "rope"):
        return rope_backward_reference(grads, cos, sin, with_fp8)
    strided = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    rows, _, size = strided[0].shape
    head_counts = [grad.shape[1] for grad in strided]
    width = sum(head_counts) * size
    d_qkv = torch.empty(rows, width, dtype=strided[0].dtype, device=strided[0].device)
    fp8 = empty_fp8(rows, width, d_qkv.device) if with_fp8 else None
    table = d_qkv if cos is None else cos
    _rope_backward[(rows,)](
        *(item for grad in strided for item in (grad, grad.stride(0), grad.stride(1))),
        d_qkv,
        d_qkv if fp8 is None else fp8.values,
        d_qkv if fp8 is None else fp8.scales,
        table,
        table if sin is None else sin,
        table.shape[0],
        *head_counts,
        size // 2,
        cos is not None,
        with_fp8,
        *(next_power_of_2(count, 1) for count in head_counts),
        next_power_of_2(size // 2, 1),
        num_warps=4,
    )
    return d_qkv, fp8


def rope_backward_reference(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    with_fp8: bool = False,
) -> tuple[torch.Tensor, RowwiseFp8 | None]:
    """As rope_backward."""
    d_qkv = torch.cat(grads, 1)
    if cos is not None and sin is not None:
        apply_rope_reference(d_qkv[:, : -grads[2].shape[1]], cos, -sin)
    d_qkv = d_qkv.flatten(1)
    return d_qkv, quantise_reference(d_qkv) if with_fp8 else None


def add_lora_and_rope(
    y: torch.Tensor,
    low_rank: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_size: int,
    rotated_heads: int,
) -> None:
    """Add low_rank · bᵀ and `bias` to y in place, and RoPE to its first `rotated_heads`: one pass, one rounding.

    y: (tokens, N) contiguous, heads of `head_size` values: queries, keys, values. low_rank, b, bias: as fp8.add_lora
    has them. cos, sin: as apply_rope has them.
    """
    if not runs_kernels(y, "fp8"):
        return add_lora_and_rope_reference(y, low_rank, b, bias, cos, sin, head_size, rotated_heads)
    (rows, width), rank = y.shape, b.shape[1]
    tile = tiles.add_lora_and_rope_tile(tiles.card_of(y.device), next_power_of_2(head_size // 2))
    _add_lora_and_rope[(triton.cdiv(rows, tile.block_m), width // head_size)](
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
        rotated_heads,
        head_size // 2,
        bias is not None,
        tile.block_m,
        tile.block_n,
        min(64, next_power_of_2(rank)) if rank else 16,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def add_lora_and_rope_reference(
    y: torch.Tensor,
    low_rank: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_size: int,
    rotated_heads: int,
) -> None:
    """As add_lora_and_rope."""
    total = y.float()
    add_lora_reference(total, low_rank, b, None, bias)
    heads = total.unflatten(1, (-1, head_size))[:, :rotated_heads]
    apply_rope_reference(heads, cos, sin)
    y.copy_(total)


@jit
def _apply_rope(
    X: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    COS: tl.tensor,
    SIN: tl.tensor,
    period: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
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
def _rotated_back(
    SOURCE: tl.tensor,
    at: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of all heads of a token, rotated back by angles with these cosines and sines, rounded."""
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (tl.arange(0, BLOCK_H)[:, None] < HEADS) & (column < HALF)
    a = tl.load(SOURCE + at + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(SOURCE + at + HALF + column, mask=inside, other=0.0).to(tl.float32)
    dtype = SOURCE.dtype.element_ty
    return (a * c + b * s).to(dtype), (b * c - a * s).to(dtype)


@jit
def _amax(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The largest absolute value in both halves of a token's heads."""
    return tl.max(tl.max(tl.maximum(tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32))), 1), 0)


@jit
def _store_heads(
    OUT: tl.tensor,
    start: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Store both halves of heads that lie one behind the other from `start` on."""
    head = tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (head < HEADS) & (column < HALF)
    at = OUT + start + head * 2 * HALF + column
    tl.store(at, a, mask=inside)
    tl.store(at + HALF, b, mask=inside)


@jit
def _rope_backward(
    QUERY: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    KEY: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    VALUE: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    OUT: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    COS: tl.tensor,
    SIN: tl.tensor,
    period: tl.tensor,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    WITH_FP8: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    # A program has one token.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)[None, :]
    c = tl.full([1, BLOCK_N], 1.0, tl.float32)
    s = tl.zeros([1, BLOCK_N], tl.float32)
    if ROTATED:
        table = (row % period) * 2 * HALF + column
        c = tl.load(COS + table, mask=column < HALF, other=0.0).to(tl.float32)
        s = tl.load(SIN + table, mask=column < HALF, other=0.0).to(tl.float32)
    q_a, q_b = _rotated_back(
        QUERY, row * q_row + tl.arange(0, BLOCK_Q)[:, None] * q_head, c, s, Q_HEADS, HALF, BLOCK_Q, BLOCK_N
    )
    k_a, k_b = _rotated_back(
        KEY, row * k_row + tl.arange(0, BLOCK_K)[:, None] * k_head, c, s, K_HEADS, HALF, BLOCK_K, BLOCK_N
    )
    v_a, v_b = _rotated_back(
        VALUE, row * v_row + tl.arange(0, BLOCK_V)[:, None] * v_head, 1.0, 0.0, V_HEADS, HALF, BLOCK_V, BLOCK_N
    )
    start = row * (Q_HEADS + K_HEADS + V_HEADS) * 2 * HALF
    k_start = start + Q_HEADS * 2 * HALF
    v_start = k_start + K_HEADS * 2 * HALF
    _store_heads(OUT, start, q_a, q_b, Q_HEADS, HALF, BLOCK_Q, BLOCK_N)
    _store_heads(OUT, k_start, k_a, k_b, K_HEADS, HALF, BLOCK_K, BLOCK_N)
    _store_heads(OUT, v_start, v_a, v_b, V_HEADS, HALF, BLOCK_V, BLOCK_N)
    if WITH_FP8:
        scale = scale_of_amax(tl.maximum(_amax(q_a, q_b), tl.maximum(_amax(k_a, k_b), _amax(v_a, v_b))))
        tl.store(SCALES + row, scale)
        _store_heads(VALUES, start, _to_fp8(q_a, scale), _to_fp8(q_b, scale), Q_HEADS, HALF, BLOCK_Q, BLOCK_N)
        _store_heads(VALUES, k_start, _to_fp8(k_a, scale), _to_fp8(k_b, scale), K_HEADS, HALF, BLOCK_K, BLOCK_N)
        _store_heads(VALUES, v_start, _to_fp8(v_a, scale), _to_fp8(v_b, scale), V_HEADS, HALF, BLOCK_V, BLOCK_N)


@jit
def _to_fp8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """x divided by its row's scale, in e4m3."""
    return (x.to(tl.float32) / scale).to(tl.float8e4nv)


@jit
def _add_lora_and_rope(
    Y: tl.tensor,
    LOW_RANK: tl.tensor,
    low_rank_stride: tl.tensor,
    B: tl.tensor,
    b_stride: tl.tensor,
    BIAS: tl.tensor,
    COS: tl.tensor,
    SIN: tl.tensor,
    period: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    RANK: tl.tensor,
    rotated_heads: tl.tensor,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    # A program has some tokens of one head, in two halves.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_N)[None, :]
    output = head * 2 * HALF + column
    long_row = row.to(tl.int64)
    inside = (row < rows) & (column < HALF)
    at = long_row * N + output
    first = tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(Y + at + HALF, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, RANK, BLOCK_R):
        across = start + tl.arange(0, BLOCK_R)[None, :]
        down = start + tl.arange(0, BLOCK_R)[:, None]
        low_rank = tl.load(
            LOW_RANK + long_row * low_rank_stride + across, mask=(row < rows) & (across < RANK), other=0.0
        )
        b_mask = (column < HALF) & (down < RANK)
        b_at = output.to(tl.int64) * b_stride + down
        first = tl.dot(low_rank, tl.load(B + b_at, mask=b_mask, other=0.0), first)
        second = tl.dot(low_rank, tl.load(B + b_at + HALF * b_stride, mask=b_mask, other=0.0), second)
    if HAS_BIAS:
        first += tl.load(BIAS + output, mask=column < HALF, other=0.0).to(tl.float32)
        second += tl.load(BIAS + output + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    # Values are rotated by no angle: cos 1, sin 0.
    rotates = inside & (head < rotated_heads)
    table = (row % period).to(tl.int64) * 2 * HALF + column
    c = tl.load(COS + table, mask=rotates, other=1.0).to(tl.float32)
    s = tl.load(SIN + table, mask=rotates, other=0.0).to(tl.float32)
    tl.store(Y + at, first * c - second * s, mask=inside)
    tl.store(Y + at + HALF, second * c + first * s, mask=inside)
