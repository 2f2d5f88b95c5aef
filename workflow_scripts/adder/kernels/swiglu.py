"""The gated activation of an MLP, forward and backward, as Triton kernels.

Arithmetic is fp32, results are stored in the tensors' own dtype. "Strided": rows may lie further apart than they are
long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adder.kernels.dropout import dropout_mask, kept_numbers, threshold_of
from adder.kernels.fp8 import Fp8Rows, empty_rows, fp8_scale, quantise, quantise_reference
from adder.kernels.triton_utils import Tile, jit, runs_kernels, tl, triton, warps_for, width_of

ACTIVATIONS = ("silu", "gelu_tanh")
# Numbers of a row that one program can hold: 32 a thread.
WHOLE_ROW = 16384
# Ranks that gated_rows can hold: a down layer's sums stay in registers.
WIDEST_RANK = 64
ROWS_TILE = Tile(16, 128, 4, 3)
# Of 13 settings on an H100 good for all: with and without what is left out, with dropout, at ranks 16 and 64.
BACKWARD_TILE, SHARES = Tile(32, 64, 4, 2), 16


def gated_into(gate_up: torch.Tensor, activation: str, out: torch.Tensor, quantised: bool = False) -> Fp8Rows | None:
    """Write activation(gate) · up into `out`, (tokens, width), strided. gate_up: (tokens, 2 · width), contiguous.

    `quantised`: return what was written in fp8 as well.
    """
    if not runs_kernels(gate_up):
        return gated_into_reference(gate_up, activation, out, quantised)
    rows, width = out.shape
    if quantised and width <= WHOLE_ROW:
        in_fp8 = empty_rows(rows, width, out.device)
        block = width_of(width)
        warps = 16 if block > 4096 else 8
        _gated_quantised[(rows,)](
            gate_up, out, out.stride(0), *vars(in_fp8).values(), width, activation == "silu", block, num_warps=warps
        )
        return in_fp8
    block = min(2048, width_of(width))
    grid = (rows, triton.cdiv(width, block))
    _gated[grid](gate_up, out, out.stride(0), width, activation == "silu", block, num_warps=warps_for(block))
    return quantise(out) if quantised else None


def gated_into_reference(gate_up, activation, out, quantised=False):
    """As gated_into."""
    gate, up = gate_up.float().chunk(2, -1)
    out.copy_(activate(gate, activation) * up)
    return quantise_reference(out) if quantised else None


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """One of ACTIVATIONS."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


@dataclass
class LeftOut:
    """What an fp8 product leaves out of gate_up: the share of gate's and up's LoRA pairs, x·Aᵀ·(s·B)ᵀ, and the bias.

    gate, up: s·B, (width, rank), strided, None where a layer has no pair. bias: (2 · width,) or None. The sum is
    rounded to gate_up's dtype, forward and backward alike.
    """

    gate: torch.Tensor | None
    up: torch.Tensor | None
    bias: torch.Tensor | None


def gated_rows(
    gate_up: torch.Tensor,
    activation: str,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    left_out: LeftOut,
    a: torch.Tensor,
) -> tuple[Fp8Rows, torch.Tensor]:
    """Return h = activation(gate) · up in fp8, and h·aᵀ, (tokens, rank), from a gate_up that lacks `left_out`.

    gate, up: x·Aᵀ of these layers, (tokens, rank) strided, None as in `left_out`. a: A of the down layer, (rank, width)
    contiguous, maybe of rank 0. No rank may exceed WIDEST_RANK.

    In matrices of (tokens, width) numbers of 16 bits, this reads gate_up (2), writes h (1), reads it again once the
    rows' scales are known (1) and writes it in fp8 (a half). Adding the share to gate_up (4), gated_into in fp8 (3.5)
    and the product with a (1) would be 8.5: at 16,384 tokens and a width of 14,336 4.0 GB a layer, and not 2.1.
    """
    if not runs_kernels(gate_up):
        return gated_rows_reference(gate_up, activation, gate, up, left_out, a)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    in_fp8 = empty_rows(rows, width, gate_up.device)
    low_rank = torch.empty(rows, a.shape[0], dtype=gate_up.dtype, device=gate_up.device)
    hidden = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    ranks = [matrix.shape[-1] if matrix is not None else 0 for matrix in (a.t(), gate, up)]
    tile = ROWS_TILE
    _gated_rows[(triton.cdiv(rows, tile.rows),)](
        gate_up,
        *_with_strides(gate_up, gate, left_out.gate, up, left_out.up),
        gate_up if left_out.bias is None else left_out.bias,
        a,
        hidden,
        *vars(in_fp8).values(),
        low_rank,
        rows,
        width,
        *ranks,
        1.0,
        activation == "silu",
        left_out.bias is not None,
        # Wider than a tile is high: else Triton lays all warps along the few rows, and each computes all of them.
        width_of(ranks[0], 2 * tile.rows) if ranks[0] else 0,
        *(width_of(rank) if rank else 0 for rank in ranks[1:]),
        tile.rows,
        _columns(tile, ranks),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return in_fp8, low_rank


def gated_rows_reference(gate_up, activation, gate, up, left_out, a):
    """As gated_rows."""
    hidden = torch.empty_like(gate_up[:, : gate_up.shape[1] // 2])
    gated_into_reference(_complete(gate_up, gate, up, left_out), activation, hidden)
    return quantise_reference(hidden), (hidden.float() @ a.float().t()).to(gate_up.dtype)


def _complete(gate_up, gate, up, left_out):
    """gate_up with what it lacks."""
    total = gate_up.float()
    if left_out.bias is not None:
        total = total + left_out.bias.float()
    halves = list(total.chunk(2, -1))
    for i, (x, b) in enumerate(((gate, left_out.gate), (up, left_out.up))):
        if x is not None:
            halves[i] = halves[i] + x.float() @ b.float().t()
    return torch.cat(halves, -1).to(gate_up.dtype)


def _columns(tile: Tile, ranks: list[int]) -> int:
    """The tile's columns, fewer with wide ranks."""
    return tile.columns if max(ranks) <= 16 else min(tile.columns, 64 if max(ranks) <= 64 else 32)


def _with_strides(stand_in: torch.Tensor, *matrices: torch.Tensor | None) -> list:
    """Each matrix and the distance of its rows, as kernels take them; `stand_in` for None, which is not read."""
    matrices = (stand_in if matrix is None else matrix for matrix in matrices)
    return [item for matrix in matrices for item in (matrix, matrix.stride(0))]


@dataclass
class ThinGrads:
    """What gated_backward finds beside the gradient to its input, fp32; None where a layer has no LoRA pair."""

    down_a: torch.Tensor | None  # (rank, width)
    gate_b: torch.Tensor | None  # (width, rank), as if the scaling were 1
    up_b: torch.Tensor | None
    # Of each row of the gradient to gate_up its largest absolute number, (tokens,): where that goes into fp8.
    largest: torch.Tensor | None


def gated_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
    gate: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    dropout: tuple[int, float] | None = None,
    left_out: LeftOut | None = None,
) -> tuple[torch.Tensor, ThinGrads]:
    """Backward through h = activation(gate) · up, with what LoRA has to do over matrices as wide, in one pass.

    grad: gradient to h, (tokens, width), strided, without the share of the down layer's pair. Returns the gradient to
    gate_up, (tokens, 2 · width) contiguous, and the pairs' gradients. `down`: the gradient to h·Aᵀ, (tokens, rank)
    strided, and A, (rank, width) contiguous, whose product is that share. `gate`, `up`: x·Aᵀ of these layers, (tokens,
    rank) strided. `dropout`: seed and probability of the down layer's. `left_out`: what gate_up lacks, as gated_rows
    has it; nothing by default.
    """
    if not runs_kernels(gate_up):
        return gated_backward_reference(gate_up, grad, activation, down, gate, up, dropout, left_out)
    rows, width = grad.shape
    seed, p = dropout or (0, 0.0)
    ranks = [matrix.shape[-1] if matrix is not None else 0 for matrix in (down and down[0], gate, up)]
    tile = BACKWARD_TILE
    across = _columns(tile, ranks)
    shares = max(1, min(SHARES, rows // 256))
    per_share = triton.cdiv(triton.cdiv(rows, shares), tile.rows) * tile.rows
    result = torch.empty_like(gate_up)
    parts = [
        torch.empty(shares, *shape, device=grad.device, dtype=torch.float32)
        for shape in ((ranks[0], width), (width, ranks[1]), (width, ranks[2]))
    ]
    largest = None if left_out is None else torch.zeros(rows, device=grad.device, dtype=torch.float32)
    left, right = down or (grad, grad)
    gate_b, up_b, bias = vars(left_out).values() if left_out is not None else (None, None, None)
    _gated_backward[(triton.cdiv(width, across), shares)](
        gate_up,
        grad,
        grad.stride(0),
        left,
        left.stride(0),
        right,
        *_with_strides(grad, gate, gate_b, up, up_b),
        grad if bias is None else bias,
        result,
        *parts,
        grad if largest is None else largest,
        rows,
        width,
        *ranks,
        per_share,
        seed,
        threshold_of(p),
        1 / (1 - p),
        1.0,
        0.0,
        activation == "silu",
        dropout is not None,
        left_out is not None,
        bias is not None,
        *(width_of(rank) if rank else 0 for rank in ranks),
        tile.rows,
        across,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums = (part.sum(0) if rank else None for part, rank in zip(parts, ranks, strict=True))
    return result, ThinGrads(*sums, largest)


def gated_backward_reference(gate_up, grad, activation, down=None, gate=None, up=None, dropout=None, left_out=None):
    """As gated_backward."""
    if left_out is not None:
        gate_up = _complete(gate_up, gate, up, left_out)
    whole, mask = grad.float(), 1.0
    if dropout is not None:
        mask = dropout_mask(dropout[0], *grad.shape, dropout[1], grad.device) / (1 - dropout[1])
    if down is not None:
        whole = whole + mask * (down[0].float() @ down[1].float())
    with torch.enable_grad():
        wide = gate_up.detach().float().requires_grad_()
        left, right = wide.chunk(2, -1)
        value = activate(left, activation) * right
        (result,) = torch.autograd.grad(value, wide, whole)
    result = result.to(gate_up.dtype)
    halves = result.float().chunk(2, -1)
    hidden = value.detach().to(gate_up.dtype).float() * mask
    down_a = down[0].float().t() @ hidden if down is not None else None
    products = (half.t() @ x.float() if x is not None else None for half, x in zip(halves, (gate, up), strict=True))
    largest = None if left_out is None else result.float().abs().amax(-1)
    return result, ThinGrads(down_a, *products, largest)


@jit
def _gate(gate, SILU: tl.constexpr):
    """Return activation(gate) and its slope; gelu's tanh by way of the sigmoid: tanh(z) = 2 · sigmoid(2z) - 1."""
    if SILU:
        s = tl.sigmoid(gate)
        value = gate * s
        slope = s * (1 + gate * (1 - s))
    else:
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        s = tl.sigmoid(2 * z)
        value = gate * s
        slope = s + gate * 2 * s * (1 - s) * 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
    return value, slope


@jit
def _gated(GATE_UP, OUT, out_stride, F, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(GATE_UP + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _gate(gate, SILU)
    tl.store(OUT + row * out_stride + column, value * up, mask=inside)


@jit
def _gated_quantised(GATE_UP, OUT, out_stride, VALUES, SCALES, F, SILU: tl.constexpr, BLOCK: tl.constexpr):
    # As _gated, a whole row at once: its largest number gives the scale of its fp8 values.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(GATE_UP + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _gate(gate, SILU)
    y = (value * up).to(OUT.dtype.element_ty)
    tl.store(OUT + row * out_stride + column, y, mask=inside)
    y = y.to(tl.float32)
    scale = fp8_scale(tl.max(tl.abs(y), 0))
    tl.store(SCALES + row, scale)
    tl.store(VALUES + row * F + column, (y / scale).to(tl.float8e4nv), mask=inside)


@jit
def _tile(X, x_stride, row, rows, rank, R: tl.constexpr):
    """A tile of a thin matrix (rows, rank), R wide."""
    across = tl.arange(0, R)[None, :]
    return tl.load(X + row.to(tl.int64) * x_stride + across, mask=(row < rows) & (across < rank), other=0.0)


@jit
def _tile_of_b(B, b_stride, column, F, rank, R: tl.constexpr):
    """A tile of s·B, (F, rank), turned round: R high."""
    down = tl.arange(0, R)[:, None]
    return tl.load(B + column.to(tl.int64) * b_stride + down, mask=(column < F) & (down < rank), other=0.0)


@jit
def _add_share(y, x, b, one):
    """y + x · b; `one` is 1, unknown to the compiler, which else adds within the product and fetches no y ahead."""
    return y + tl.dot(x, b) * one


@jit
def _gated_rows(
    GATE_UP,
    GATE,
    gate_stride,
    B_GATE,
    b_gate_stride,
    UP,
    up_stride,
    B_UP,
    b_up_stride,
    BIAS,
    DOWN_A,
    HIDDEN,
    VALUES,
    SCALES,
    LOW_RANK,
    rows,
    F,
    down_rank,
    gate_rank,
    up_rank,
    one,
    SILU: tl.constexpr,
    BIASED: tl.constexpr,
    RD: tl.constexpr,
    RG: tl.constexpr,
    RU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # A program has some whole rows: their largest numbers give the scales of their fp8 values.
    flat = tl.program_id(0) * BM + tl.arange(0, BM)
    row = flat[:, None]
    long_row = row.to(tl.int64)
    kind = GATE_UP.dtype.element_ty
    if RG > 0:
        gate_x = _tile(GATE, gate_stride, row, rows, gate_rank, RG)
    if RU > 0:
        up_x = _tile(UP, up_stride, row, rows, up_rank, RU)
    if RD > 0:
        low_rank = tl.zeros([BM, RD], tl.float32)
    largest = tl.zeros([BM, BN], tl.float32)
    for start in range(0, F, BN):
        column = start + tl.arange(0, BN)[None, :]
        inside = (row < rows) & (column < F)
        at = long_row * 2 * F + column
        gate = tl.load(GATE_UP + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(GATE_UP + at + F, mask=inside, other=0.0).to(tl.float32)
        if RG > 0:
            gate = _add_share(gate, gate_x, _tile_of_b(B_GATE, b_gate_stride, column, F, gate_rank, RG), one)
        if RU > 0:
            up = _add_share(up, up_x, _tile_of_b(B_UP, b_up_stride, column, F, up_rank, RU), one)
        if BIASED:
            gate += tl.load(BIAS + column, mask=column < F, other=0.0).to(tl.float32)
            up += tl.load(BIAS + F + column, mask=column < F, other=0.0).to(tl.float32)
        gate = gate.to(kind).to(tl.float32)
        up = up.to(kind).to(tl.float32)
        value, _ = _gate(gate, SILU)
        hidden = (value * up).to(kind)
        tl.store(HIDDEN + long_row * F + column, hidden, mask=inside)
        largest = tl.maximum(largest, tl.abs(hidden.to(tl.float32)))
        if RD > 0:
            across = tl.arange(0, RD)[None, :]
            down = start + tl.arange(0, BN)[:, None]
            a = tl.load(DOWN_A + across * F + down, mask=(across < down_rank) & (down < F), other=0.0)
            low_rank = tl.dot(hidden, a, low_rank)
    if RD > 0:
        across = tl.arange(0, RD)[None, :]
        tl.store(LOW_RANK + long_row * down_rank + across, low_rank, mask=(row < rows) & (across < down_rank))
    scale = fp8_scale(tl.max(largest, 1))
    tl.store(SCALES + flat, scale, mask=flat < rows)
    tl.debug_barrier()  # one thread may read what another has written
    last = (tl.cdiv(F, BN) - 1) * BN
    for start in range(0, F, BN):  # the last columns first: these may still be in the cache
        column = last - start + tl.arange(0, BN)[None, :]
        inside = (row < rows) & (column < F)
        at = long_row * F + column
        hidden = tl.load(HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(VALUES + at, (hidden / scale[:, None]).to(tl.float8e4nv), mask=inside)


@jit
def _gated_backward(
    GATE_UP,
    GRAD,
    grad_stride,
    LEFT,
    left_stride,
    RIGHT,
    GATE,
    gate_stride,
    B_GATE,
    b_gate_stride,
    UP,
    up_stride,
    B_UP,
    b_up_stride,
    BIAS,
    RESULT,
    DOWN_A,
    GATE_B,
    UP_B,
    LARGEST,
    rows,
    F,
    down_rank,
    gate_rank,
    up_rank,
    per_share,
    seed,
    threshold,
    scale,
    one,
    nothing,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
    LEFT_OUT: tl.constexpr,
    BIASED: tl.constexpr,
    RD: tl.constexpr,
    RG: tl.constexpr,
    RU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # A program has a block of columns and a share of the rows; the shares' sums are added up afterwards. Tiles are
    # turned round, (columns, rows): so they are the left, high side of every product, which takes them from registers.
    share = tl.program_id(1)
    column = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    kind = GATE_UP.dtype.element_ty
    if RD > 0:
        down = tl.arange(0, RD)[None, :]
        right_mask = (down < down_rank) & (column < F)
        right = tl.load(RIGHT + down * F + column, mask=right_mask, other=0.0)
        down_a = tl.zeros([BN, RD], tl.float32)
    if RG > 0:
        gate_b = tl.zeros([BN, RG], tl.float32)
    if RU > 0:
        up_b = tl.zeros([BN, RU], tl.float32)
    if LEFT_OUT:
        if RG > 0:
            b_gate = _tile(B_GATE, b_gate_stride, column, F, gate_rank, RG)
        if RU > 0:
            b_up = _tile(B_UP, b_up_stride, column, F, up_rank, RU)
        if BIASED:
            gate_bias = tl.load(BIAS + column, mask=column < F, other=0.0).to(tl.float32)
            up_bias = tl.load(BIAS + F + column, mask=column < F, other=0.0).to(tl.float32)
    first = share * per_share
    for start in range(first, min(first + per_share, rows), BM):
        flat = start + tl.arange(0, BM)
        row = flat[None, :]
        long_row = row.to(tl.int64)
        inside = (row < rows) & (column < F)
        gate_at = long_row * 2 * F + column
        grad = tl.load(GRAD + long_row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(GATE_UP + gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(GATE_UP + gate_at + F, mask=inside, other=0.0).to(tl.float32)
        if RG > 0:
            gate_x = _tile(GATE, gate_stride, flat[:, None], rows, gate_rank, RG)
        if RU > 0:
            up_x = _tile(UP, up_stride, flat[:, None], rows, up_rank, RU)
        if RD > 0:
            left = _tile(LEFT, left_stride, flat[:, None], rows, down_rank, RD)
            added = tl.dot(right, tl.trans(left))
        if LEFT_OUT:
            if RG > 0:
                gate = _add_share(gate, b_gate, tl.trans(gate_x), one)
            if RU > 0:
                up = _add_share(up, b_up, tl.trans(up_x), one)
            if BIASED:
                gate += gate_bias
                up += up_bias
            gate = gate.to(kind).to(tl.float32)
            up = up.to(kind).to(tl.float32)
        elif RD > 0:
            # `nothing` is 0, unknown to the compiler, which else lays these out as they are loaded and the products'
            # sums otherwise, and computes the activation in both.
            gate += added * nothing
            up += added * nothing
        value, slope = _gate(gate, SILU)
        if RD > 0:
            hidden = (value * up).to(kind)
            if DROP:
                kept = kept_numbers(row, column, seed, threshold)
                added = tl.where(kept, added * scale, 0.0)
                hidden = tl.where(kept, hidden, 0.0)
            grad += added * one
            down_a = tl.dot(hidden, left, down_a)
        d_gate = (grad * up * slope).to(kind)
        d_up = (grad * value).to(kind)
        tl.store(RESULT + gate_at, d_gate, mask=inside)
        tl.store(RESULT + gate_at + F, d_up, mask=inside)
        if LEFT_OUT:  # the largest of several is the same in whatever order they come
            largest = tl.max(tl.maximum(tl.abs(d_gate.to(tl.float32)), tl.abs(d_up.to(tl.float32))), 0)
            tl.atomic_max(LARGEST + flat, largest, mask=flat < rows, sem="relaxed")
        if RG > 0:
            gate_b = tl.dot(d_gate, gate_x, gate_b)
        if RU > 0:
            up_b = tl.dot(d_up, up_x, up_b)
    if RD > 0:
        if DROP:
            down_a *= scale
        tl.store(DOWN_A + (share * down_rank + down) * F + column, down_a, mask=right_mask)
    if RG > 0:
        rank = tl.arange(0, RG)[None, :]
        at = (share * F + column) * gate_rank + rank
        tl.store(GATE_B + at, gate_b, mask=(column < F) & (rank < gate_rank))
    if RU > 0:
        rank = tl.arange(0, RU)[None, :]
        at = (share * F + column) * up_rank + rank
        tl.store(UP_B + at, up_b, mask=(column < F) & (rank < up_rank))
