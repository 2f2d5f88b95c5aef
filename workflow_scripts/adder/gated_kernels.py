"""The gated activation of an MLP, forward and backward, as Triton kernels.

Arithmetic is fp32, results are stored in the tensors' own dtype. "Strided": rows may lie further apart than they are
long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adder.dropout_kernels import dropout_mask, kept_numbers, threshold_of
from adder.fp8 import Fp8Rows, empty_rows, fp8_scale, quantise, quantise_reference
from adder.triton_tools import jit, runs_kernels, tl, triton, warps_for, width_of

ACTIVATIONS = ("silu", "gelu_tanh")
# Numbers of a row that one program can hold: 32 a thread.
WHOLE_ROW = 16384


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
class ThinGrads:
    """What gated_backward finds beside the gradient to its input, fp32; None where a layer has no LoRA pair."""

    down_a: torch.Tensor | None  # (rank, width)
    gate_b: torch.Tensor | None  # (width, rank), as if the scaling were 1
    up_b: torch.Tensor | None


def gated_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
    gate: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    dropout: tuple[int, float] | None = None,
) -> tuple[torch.Tensor, ThinGrads]:
    """Backward through h = activation(gate) · up, with what LoRA has to do over matrices as wide, in one pass.

    grad: gradient to h, (tokens, width), strided, without the share of the down layer's pair. Returns the gradient to
    gate_up, (tokens, 2 · width) contiguous, and the pairs' gradients. `down`: the gradient to h·Aᵀ, (tokens, rank)
    strided, and A, (rank, width) contiguous, whose product is that share. `gate`, `up`: x·Aᵀ of these layers, (tokens,
    rank) strided. `dropout`: seed and probability of the down layer's.
    """
    if not runs_kernels(gate_up):
        return gated_backward_reference(gate_up, grad, activation, down, gate, up, dropout)
    rows, width = grad.shape
    seed, p = dropout or (0, 0.0)
    ranks = [matrix.shape[-1] if matrix is not None else 0 for matrix in (down and down[0], gate, up)]
    across = 128 if max(ranks) <= 16 else 64 if max(ranks) <= 64 else 32
    # 32 shares, tiles of 32 × 128, 4 warps and 2 stages were the fastest of 48 settings on an H100, at rank 16.
    shares = max(1, min(32, rows // 256))
    per_share = triton.cdiv(triton.cdiv(rows, shares), 32) * 32
    result = torch.empty_like(gate_up)
    parts = [
        torch.empty(shares, *shape, device=grad.device, dtype=torch.float32)
        for shape in ((ranks[0], width), (width, ranks[1]), (width, ranks[2]))
    ]
    left, right = down or (grad, grad)
    gate, up = (grad if matrix is None else matrix for matrix in (gate, up))
    _gated_backward[(triton.cdiv(width, across), shares)](
        gate_up,
        grad,
        grad.stride(0),
        left,
        left.stride(0),
        right,
        gate,
        gate.stride(0),
        up,
        up.stride(0),
        result,
        *parts,
        rows,
        width,
        *ranks,
        per_share,
        seed,
        threshold_of(p),
        1 / (1 - p),
        activation == "silu",
        dropout is not None,
        *(width_of(rank) if rank else 0 for rank in ranks),
        32,
        across,
        num_warps=4,
        num_stages=2,
    )
    return result, ThinGrads(*(part.sum(0) if rank else None for part, rank in zip(parts, ranks, strict=True)))


def gated_backward_reference(gate_up, grad, activation, down=None, gate=None, up=None, dropout=None):
    """As gated_backward."""
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
    return result, ThinGrads(down_a, *products)


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
def _gated_backward(
    GATE_UP,
    GRAD,
    grad_stride,
    LEFT,
    left_stride,
    RIGHT,
    GATE,
    gate_stride,
    UP,
    up_stride,
    RESULT,
    DOWN_A,
    GATE_B,
    UP_B,
    rows,
    F,
    down_rank,
    gate_rank,
    up_rank,
    per_share,
    seed,
    threshold,
    scale,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
    RD: tl.constexpr,
    RG: tl.constexpr,
    RU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # A program has a block of columns and a share of the rows; the shares' sums are added up afterwards.
    share = tl.program_id(1)
    flat = tl.program_id(0) * BN + tl.arange(0, BN)
    column = flat[None, :]
    kind = GATE_UP.dtype.element_ty
    if RD > 0:
        down = tl.arange(0, RD)
        right_mask = (down[:, None] < down_rank) & (column < F)
        right = tl.load(RIGHT + down[:, None] * F + column, mask=right_mask, other=0.0)
        down_a = tl.zeros([RD, BN], tl.float32)
    if RG > 0:
        gate_b = tl.zeros([BN, RG], tl.float32)
    if RU > 0:
        up_b = tl.zeros([BN, RU], tl.float32)
    first = share * per_share
    for start in range(first, min(first + per_share, rows), BM):
        row = start + tl.arange(0, BM)[:, None]
        long_row = row.to(tl.int64)
        inside = (row < rows) & (column < F)
        gate_at = long_row * 2 * F + column
        grad = tl.load(GRAD + long_row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(GATE_UP + gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(GATE_UP + gate_at + F, mask=inside, other=0.0).to(tl.float32)
        value, slope = _gate(gate, SILU)
        if RD > 0:
            left_mask = (row < rows) & (down[None, :] < down_rank)
            left = tl.load(LEFT + long_row * left_stride + down[None, :], mask=left_mask, other=0.0)
            added = tl.dot(left, right)
            hidden = (value * up).to(kind)
            if DROP:
                kept = kept_numbers(row, column, seed, threshold)
                added = tl.where(kept, added * scale, 0.0)
                hidden = tl.where(kept, hidden, 0.0)
            grad += added
            down_a = tl.dot(tl.trans(left), hidden, down_a)
        d_gate = (grad * up * slope).to(kind)
        d_up = (grad * value).to(kind)
        tl.store(RESULT + gate_at, d_gate, mask=inside)
        tl.store(RESULT + gate_at + F, d_up, mask=inside)
        if RG > 0:
            rank = tl.arange(0, RG)[None, :]
            x = tl.load(GATE + long_row * gate_stride + rank, mask=(row < rows) & (rank < gate_rank), other=0.0)
            gate_b = tl.dot(tl.trans(d_gate), x, gate_b)
        if RU > 0:
            rank = tl.arange(0, RU)[None, :]
            x = tl.load(UP + long_row * up_stride + rank, mask=(row < rows) & (rank < up_rank), other=0.0)
            up_b = tl.dot(tl.trans(d_up), x, up_b)
    if RD > 0:
        if DROP:
            down_a *= scale
        tl.store(DOWN_A + (share * down_rank + down[:, None]) * F + column, down_a, mask=right_mask)
    if RG > 0:
        rank = tl.arange(0, RG)[None, :]
        at = (share * F + flat[:, None]) * gate_rank + rank
        tl.store(GATE_B + at, gate_b, mask=(flat[:, None] < F) & (rank < gate_rank))
    if RU > 0:
        rank = tl.arange(0, RU)[None, :]
        at = (share * F + flat[:, None]) * up_rank + rank
        tl.store(UP_B + at, up_b, mask=(flat[:, None] < F) & (rank < up_rank))
