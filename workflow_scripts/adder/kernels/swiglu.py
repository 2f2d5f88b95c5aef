"""SwiGLU (Shazeer 2020, arXiv:2002.05202), and GeGLU with tanh's GELU, forward and backward as Triton kernels.

h = activation(gate) · up, where gate and up are the halves of gate_up, what the gate and up projections give. Backward
computes h anew instead of keeping it, and takes LoRA's gradients that read h, gate or up along in the same pass.
Arithmetic is fp32, results are stored in the tensors' own dtype. "Strided": rows may lie further apart than they are
long.
"""

# pyright: reportPossiblyUnboundVariable=false
# In kernels: what a branch on a constexpr binds, only branches on the same constexpr read.

from __future__ import annotations

from dataclasses import dataclass

import torch

from adder.kernels import tiles
from adder.kernels.dropout import drop_threshold, dropout_mask, dropped, keep_mask
from adder.kernels.fp8 import (
    RowwiseFp8,
    empty_fp8,
    quantise,
    quantise_reference,
    scale_of_amax,
    store_row_as_fp8,
)
from adder.kernels.triton_utils import (
    jit,
    matmul_fp32,
    next_power_of_2,
    num_warps_for,
    runs_kernels,
    tl,
    triton,
)

ACTIVATIONS = ("silu", "gelu_tanh")
# Values of a row that one program can hold: 32 a thread.
MAX_SINGLE_PASS_WIDTH = 16384
# Ranks that lora_swiglu_fp8 can hold: the accumulators of the down projection's h·Aᵀ stay in registers.
MAX_FUSED_RANK = 64
SPLITS = 16  # of the rows, in swiglu_backward


def swiglu_into(gate_up: torch.Tensor, activation: str, out: torch.Tensor, with_fp8: bool = False) -> RowwiseFp8 | None:
    """Write activation(gate) · up into `out`, (tokens, width), strided. gate_up: (tokens, 2 · width), contiguous.

    `with_fp8`: return what was written in fp8 as well.
    """
    if not runs_kernels(gate_up, "swiglu"):
        return swiglu_into_reference(gate_up, activation, out, with_fp8)
    rows, width = out.shape
    if with_fp8 and width <= MAX_SINGLE_PASS_WIDTH:
        fp8 = empty_fp8(rows, width, out.device)
        block = next_power_of_2(width)
        num_warps = 16 if block > 4096 else 8
        _swiglu_fp8[(rows,)](
            gate_up,
            out,
            out.stride(0),
            fp8.values,
            fp8.scales,
            width,
            activation == "silu",
            block,
            num_warps=num_warps,
        )
        return fp8
    block = min(2048, next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    _swiglu[grid](gate_up, out, out.stride(0), width, activation == "silu", block, num_warps=num_warps_for(block))
    return quantise(out) if with_fp8 else None


def swiglu_into_reference(
    gate_up: torch.Tensor, activation: str, out: torch.Tensor, with_fp8: bool = False
) -> RowwiseFp8 | None:
    """As swiglu_into."""
    gate, up = gate_up.float().chunk(2, -1)
    out.copy_(activate(gate, activation) * up)
    return quantise_reference(out) if with_fp8 else None


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """One of ACTIVATIONS."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


@dataclass
class DeferredLora:
    """What gate_up lacks after a matmul in fp8: LoRA of gate and up, x·Aᵀ·(s·B)ᵀ, and the bias.

    The kernels that read gate_up add it, which saves a pass over that matrix. gate_b, up_b: s·B, (width, rank),
    strided, None where a projection has no LoRA. bias: (2 · width,) or None. The sum is rounded to gate_up's dtype,
    forward and backward alike.
    """

    gate_b: torch.Tensor | None
    up_b: torch.Tensor | None
    bias: torch.Tensor | None


def lora_swiglu_fp8(
    gate_up: torch.Tensor,
    activation: str,
    gate_low_rank: torch.Tensor | None,
    up_low_rank: torch.Tensor | None,
    deferred: DeferredLora,
    down_a: torch.Tensor,
) -> tuple[RowwiseFp8, torch.Tensor]:
    """Return h = activation(gate) · up in fp8, and h·Aᵀ, (tokens, rank), from a gate_up that lacks `deferred`.

    gate_low_rank, up_low_rank: x·Aᵀ of gate and up, (tokens, rank) strided, None as in `deferred`. down_a: A of the
    down projection, (rank, width) contiguous, maybe of rank 0. No rank may exceed MAX_FUSED_RANK.

    In matrices of (tokens, width) in 16 bits, this reads gate_up (2), writes h (1), reads it again once the rows'
    scales are known (1) and writes it in fp8 (a half). Adding LoRA to gate_up (4), swiglu_into in fp8 (3.5) and the
    matmul with A (1) would be 8.5: at 16,384 tokens and a width of 14,336 4.0 GB a layer, and not 2.1.
    """
    if not runs_kernels(gate_up, "fp8"):
        return lora_swiglu_fp8_reference(gate_up, activation, gate_low_rank, up_low_rank, deferred, down_a)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    fp8 = empty_fp8(rows, width, gate_up.device)
    low_rank = torch.empty(rows, down_a.shape[0], dtype=gate_up.dtype, device=gate_up.device)
    hidden = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    ranks = [matrix.shape[-1] if matrix is not None else 0 for matrix in (down_a.t(), gate_low_rank, up_low_rank)]
    tile = tiles.lora_swiglu_fp8_tile(max(ranks))
    _lora_swiglu_fp8[(triton.cdiv(rows, tile.block_m),)](
        gate_up,
        *_with_strides(gate_up, gate_low_rank, deferred.gate_b, up_low_rank, deferred.up_b),
        gate_up if deferred.bias is None else deferred.bias,
        down_a,
        hidden,
        fp8.values,
        fp8.scales,
        low_rank,
        rows,
        width,
        *ranks,
        1.0,
        activation == "silu",
        deferred.bias is not None,
        # Wider than a tile is high: else Triton lays all warps along the few rows, and each computes all of them.
        next_power_of_2(ranks[0], 2 * tile.block_m) if ranks[0] else 0,
        *(next_power_of_2(rank) if rank else 0 for rank in ranks[1:]),
        tile.block_m,
        tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return fp8, low_rank


def lora_swiglu_fp8_reference(
    gate_up: torch.Tensor,
    activation: str,
    gate_low_rank: torch.Tensor | None,
    up_low_rank: torch.Tensor | None,
    deferred: DeferredLora,
    down_a: torch.Tensor,
) -> tuple[RowwiseFp8, torch.Tensor]:
    """As lora_swiglu_fp8."""
    hidden = torch.empty_like(gate_up[:, : gate_up.shape[1] // 2])
    swiglu_into_reference(_with_deferred(gate_up, gate_low_rank, up_low_rank, deferred), activation, hidden)
    return quantise_reference(hidden), (hidden.float() @ down_a.float().t()).to(gate_up.dtype)


def _with_deferred(
    gate_up: torch.Tensor,
    gate_low_rank: torch.Tensor | None,
    up_low_rank: torch.Tensor | None,
    deferred: DeferredLora,
) -> torch.Tensor:
    """gate_up with what it lacks."""
    total = gate_up.float()
    if deferred.bias is not None:
        total = total + deferred.bias.float()
    halves = list(total.chunk(2, -1))
    for i, (low_rank, b) in enumerate(((gate_low_rank, deferred.gate_b), (up_low_rank, deferred.up_b))):
        if low_rank is not None and b is not None:
            halves[i] = halves[i] + low_rank.float() @ b.float().t()
    return torch.cat(halves, -1).to(gate_up.dtype)


def _with_strides(stand_in: torch.Tensor, *matrices: torch.Tensor | None) -> list[torch.Tensor | int]:
    """Each matrix and its rows' stride, as kernels take them; `stand_in` for None, which is not read."""
    present = [stand_in if matrix is None else matrix for matrix in matrices]
    return [item for matrix in present for item in (matrix, matrix.stride(0))]


@dataclass
class LoraGrads:
    """What swiglu_backward finds beside the gradient to its input, fp32; None where a projection has no LoRA."""

    down_a: torch.Tensor | None  # (rank, width)
    gate_b: torch.Tensor | None  # (width, rank), as if the scaling were 1
    up_b: torch.Tensor | None
    # Of each row of the gradient to gate_up its largest absolute value, (tokens,): where that goes into fp8.
    amax: torch.Tensor | None


def swiglu_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
    gate_low_rank: torch.Tensor | None = None,
    up_low_rank: torch.Tensor | None = None,
    dropout: tuple[int, float] | None = None,
    deferred: DeferredLora | None = None,
) -> tuple[torch.Tensor, LoraGrads]:
    """Backward through h = activation(gate) · up, with what LoRA has to do over matrices as wide, in one pass.

    grad: gradient to h, (tokens, width), strided, without LoRA's of the down projection. Returns the gradient to
    gate_up, (tokens, 2 · width) contiguous, and LoRA's gradients. `down`: the gradient to h·Aᵀ, (tokens, rank) strided,
    and the down projection's A, (rank, width) contiguous, whose matmul is what `grad` lacks. gate_low_rank,
    up_low_rank: x·Aᵀ of gate and up, (tokens, rank) strided. `dropout`: seed and probability of the down projection's.
    `deferred`: what gate_up lacks, as lora_swiglu_fp8 has it; nothing by default.
    """
    if not runs_kernels(gate_up, "swiglu_backward"):
        by_torch = deferred is None and runs_kernels(gate_up, "swiglu")
        one = _swiglu_backward_by_torch if by_torch else swiglu_backward_reference
        return one(gate_up, grad, activation, down, gate_low_rank, up_low_rank, dropout, deferred)
    return _swiglu_backward_by_kernel(gate_up, grad, activation, down, gate_low_rank, up_low_rank, dropout, deferred)


def swiglu_backward_alone(gate_up: torch.Tensor, grad: torch.Tensor, activation: str) -> tuple[torch.Tensor, LoraGrads]:
    """As swiglu_backward without LoRA: no matmul, so that it belongs to the family of swiglu_into."""
    if not runs_kernels(gate_up, "swiglu"):
        return swiglu_backward_reference(gate_up, grad, activation)
    return _swiglu_backward_by_kernel(gate_up, grad, activation, None, None, None, None, None)


def _swiglu_backward_by_torch(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    down: tuple[torch.Tensor, torch.Tensor] | None,
    gate_low_rank: torch.Tensor | None,
    up_low_rank: torch.Tensor | None,
    dropout: tuple[int, float] | None,
    deferred: DeferredLora | None,
) -> tuple[torch.Tensor, LoraGrads]:
    """As swiglu_backward, on cards whose matmuls Triton doesn't know: torch's, around a kernel without any."""
    down_a_grad = None
    if down is not None:
        added = torch.mm(*down)
        hidden = torch.empty(grad.shape, dtype=gate_up.dtype, device=gate_up.device)
        swiglu_into(gate_up, activation, hidden)
        if dropout is not None:
            added, hidden = dropped(added, *dropout), dropped(hidden, *dropout)
        grad = added.add_(grad)
        down_a_grad = matmul_fp32(down[0].t(), hidden)
    d_gate_up, _ = swiglu_backward_alone(gate_up, grad, activation)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    gate_b_grad = matmul_fp32(d_gate.t(), gate_low_rank) if gate_low_rank is not None else None
    up_b_grad = matmul_fp32(d_up.t(), up_low_rank) if up_low_rank is not None else None
    return d_gate_up, LoraGrads(down_a_grad, gate_b_grad, up_b_grad, None)


def _swiglu_backward_by_kernel(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    down: tuple[torch.Tensor, torch.Tensor] | None,
    gate_low_rank: torch.Tensor | None,
    up_low_rank: torch.Tensor | None,
    dropout: tuple[int, float] | None,
    deferred: DeferredLora | None,
) -> tuple[torch.Tensor, LoraGrads]:
    rows, width = grad.shape
    seed, p = dropout or (0, 0.0)
    d_down_low_rank, down_a = down or (None, None)
    low_ranks = (d_down_low_rank, gate_low_rank, up_low_rank)
    ranks = [matrix.shape[-1] if matrix is not None else 0 for matrix in low_ranks]
    tile = tiles.swiglu_backward_tile(max(ranks))
    splits = max(1, min(SPLITS, rows // 256))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), tile.block_m) * tile.block_m
    d_gate_up = torch.empty_like(gate_up)
    partial_sums = [
        torch.empty(splits, *shape, device=grad.device, dtype=torch.float32)
        for shape in ((ranks[0], width), (width, ranks[1]), (width, ranks[2]))
    ]
    amax = None if deferred is None else torch.zeros(rows, device=grad.device, dtype=torch.float32)
    lacks = deferred or DeferredLora(None, None, None)
    _swiglu_backward[(triton.cdiv(width, tile.block_n), splits)](
        gate_up,
        grad,
        grad.stride(0),
        *_with_strides(grad, d_down_low_rank),
        grad if down_a is None else down_a,
        *_with_strides(grad, gate_low_rank, lacks.gate_b, up_low_rank, lacks.up_b),
        grad if lacks.bias is None else lacks.bias,
        d_gate_up,
        *partial_sums,
        grad if amax is None else amax,
        rows,
        width,
        *ranks,
        rows_per_split,
        seed,
        drop_threshold(p),
        1 / (1 - p),
        1.0,
        0.0,
        activation == "silu",
        dropout is not None,
        deferred is not None,
        lacks.bias is not None,
        *(next_power_of_2(rank) if rank else 0 for rank in ranks),
        tile.block_m,
        tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    down_a_grad, gate_b_grad, up_b_grad = (
        part.sum(0) if rank else None for part, rank in zip(partial_sums, ranks, strict=True)
    )
    return d_gate_up, LoraGrads(down_a_grad, gate_b_grad, up_b_grad, amax)


def swiglu_backward_reference(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
    gate_low_rank: torch.Tensor | None = None,
    up_low_rank: torch.Tensor | None = None,
    dropout: tuple[int, float] | None = None,
    deferred: DeferredLora | None = None,
) -> tuple[torch.Tensor, LoraGrads]:
    """As swiglu_backward."""
    if deferred is not None:
        gate_up = _with_deferred(gate_up, gate_low_rank, up_low_rank, deferred)
    rows, width = grad.shape
    d_hidden, mask = grad.float(), 1.0
    if dropout is not None:
        mask = dropout_mask(dropout[0], rows, width, dropout[1], grad.device) / (1 - dropout[1])
    if down is not None:
        d_hidden = d_hidden + mask * (down[0].float() @ down[1].float())
    with torch.enable_grad():
        leaf = gate_up.detach().float().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        h = activate(gate, activation) * up
        (d_gate_up,) = torch.autograd.grad(h, leaf, d_hidden)
    d_gate_up = d_gate_up.to(gate_up.dtype)
    d_gate, d_up = d_gate_up.float().chunk(2, -1)
    hidden = h.detach().to(gate_up.dtype).float() * mask
    down_a_grad = down[0].float().t() @ hidden if down is not None else None
    gate_b_grad = d_gate.t() @ gate_low_rank.float() if gate_low_rank is not None else None
    up_b_grad = d_up.t() @ up_low_rank.float() if up_low_rank is not None else None
    amax = None if deferred is None else d_gate_up.float().abs().amax(-1)
    return d_gate_up, LoraGrads(down_a_grad, gate_b_grad, up_b_grad, amax)


@jit
def _activation_and_slope(gate: tl.tensor, SILU: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
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
def _swiglu(
    GATE_UP: tl.tensor, OUT: tl.tensor, out_stride: tl.tensor, F: tl.tensor, SILU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(GATE_UP + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation_and_slope(gate, SILU)
    tl.store(OUT + row * out_stride + column, value * up, mask=inside)


@jit
def _swiglu_fp8(
    GATE_UP: tl.tensor,
    OUT: tl.tensor,
    out_stride: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    F: tl.tensor,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # As _swiglu, a row at once: its largest absolute value gives the scale of its fp8 values.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(GATE_UP + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation_and_slope(gate, SILU)
    y = (value * up).to(OUT.dtype.element_ty)
    tl.store(OUT + row * out_stride + column, y, mask=inside)
    store_row_as_fp8(y.to(tl.float32), VALUES, SCALES, row, column, F)


@jit
def _load_rows(
    X: tl.tensor, x_stride: tl.tensor, row: tl.tensor, rows: tl.tensor, rank: tl.tensor, BLOCK_R: tl.constexpr
) -> tl.tensor:
    """A block of rows of a low-rank matrix (rows, rank), BLOCK_R wide."""
    across = tl.arange(0, BLOCK_R)[None, :]
    return tl.load(X + row.to(tl.int64) * x_stride + across, mask=(row < rows) & (across < rank), other=0.0)


@jit
def _load_transposed(
    B: tl.tensor, b_stride: tl.tensor, column: tl.tensor, F: tl.tensor, rank: tl.tensor, BLOCK_R: tl.constexpr
) -> tl.tensor:
    """A block of rows of s·B, (F, rank), transposed: BLOCK_R high."""
    down = tl.arange(0, BLOCK_R)[:, None]
    return tl.load(B + column.to(tl.int64) * b_stride + down, mask=(column < F) & (down < rank), other=0.0)


@jit
def _add_matmul(y: tl.tensor, x: tl.tensor, b: tl.tensor, one: tl.tensor) -> tl.tensor:
    """y + x · b; `one` is 1, unknown to the compiler, which else adds within the matmul and fetches no y ahead."""
    return y + tl.dot(x, b) * one


@jit
def _lora_swiglu_fp8(
    GATE_UP: tl.tensor,
    GATE_LOW_RANK: tl.tensor,
    gate_low_rank_stride: tl.tensor,
    GATE_B: tl.tensor,
    gate_b_stride: tl.tensor,
    UP_LOW_RANK: tl.tensor,
    up_low_rank_stride: tl.tensor,
    UP_B: tl.tensor,
    up_b_stride: tl.tensor,
    BIAS: tl.tensor,
    DOWN_A: tl.tensor,
    HIDDEN: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    DOWN_LOW_RANK: tl.tensor,
    rows: tl.tensor,
    F: tl.tensor,
    down_rank: tl.tensor,
    gate_rank: tl.tensor,
    up_rank: tl.tensor,
    one: tl.tensor,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R_DOWN: tl.constexpr,
    BLOCK_R_GATE: tl.constexpr,
    BLOCK_R_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    # A program has BLOCK_M rows from end to end: their largest absolute values give the scales of their fp8 values.
    flat = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = flat[:, None]
    long_row = row.to(tl.int64)
    dtype = GATE_UP.dtype.element_ty
    if BLOCK_R_GATE > 0:
        gate_low_rank = _load_rows(GATE_LOW_RANK, gate_low_rank_stride, row, rows, gate_rank, BLOCK_R_GATE)
    if BLOCK_R_UP > 0:
        up_low_rank = _load_rows(UP_LOW_RANK, up_low_rank_stride, row, rows, up_rank, BLOCK_R_UP)
    if BLOCK_R_DOWN > 0:
        down_low_rank = tl.zeros([BLOCK_M, BLOCK_R_DOWN], tl.float32)
    amax = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, F, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)[None, :]
        inside = (row < rows) & (column < F)
        at = long_row * 2 * F + column
        gate = tl.load(GATE_UP + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(GATE_UP + at + F, mask=inside, other=0.0).to(tl.float32)
        if BLOCK_R_GATE > 0:
            gate_b = _load_transposed(GATE_B, gate_b_stride, column, F, gate_rank, BLOCK_R_GATE)
            gate = _add_matmul(gate, gate_low_rank, gate_b, one)
        if BLOCK_R_UP > 0:
            up_b = _load_transposed(UP_B, up_b_stride, column, F, up_rank, BLOCK_R_UP)
            up = _add_matmul(up, up_low_rank, up_b, one)
        if HAS_BIAS:
            gate += tl.load(BIAS + column, mask=column < F, other=0.0).to(tl.float32)
            up += tl.load(BIAS + F + column, mask=column < F, other=0.0).to(tl.float32)
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
        value, _ = _activation_and_slope(gate, SILU)
        hidden = (value * up).to(dtype)
        tl.store(HIDDEN + long_row * F + column, hidden, mask=inside)
        amax = tl.maximum(amax, tl.abs(hidden.to(tl.float32)))
        if BLOCK_R_DOWN > 0:
            across = tl.arange(0, BLOCK_R_DOWN)[None, :]
            down = start + tl.arange(0, BLOCK_N)[:, None]
            a = tl.load(DOWN_A + across * F + down, mask=(across < down_rank) & (down < F), other=0.0)
            down_low_rank = tl.dot(hidden, a, down_low_rank)
    if BLOCK_R_DOWN > 0:
        across = tl.arange(0, BLOCK_R_DOWN)[None, :]
        tl.store(DOWN_LOW_RANK + long_row * down_rank + across, down_low_rank, mask=(row < rows) & (across < down_rank))
    scale = scale_of_amax(tl.max(amax, 1))
    tl.store(SCALES + flat, scale, mask=flat < rows)
    tl.debug_barrier()  # one thread may read what another has written
    last = (tl.cdiv(F, BLOCK_N) - 1) * BLOCK_N
    for start in range(0, F, BLOCK_N):  # the last columns first: these may still be in the cache
        column = last - start + tl.arange(0, BLOCK_N)[None, :]
        inside = (row < rows) & (column < F)
        at = long_row * F + column
        hidden = tl.load(HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(VALUES + at, (hidden / scale[:, None]).to(tl.float8e4nv), mask=inside)


@jit
def _swiglu_backward(
    GATE_UP: tl.tensor,
    GRAD: tl.tensor,
    grad_stride: tl.tensor,
    D_DOWN_LOW_RANK: tl.tensor,
    d_down_low_rank_stride: tl.tensor,
    DOWN_A: tl.tensor,
    GATE_LOW_RANK: tl.tensor,
    gate_low_rank_stride: tl.tensor,
    GATE_B: tl.tensor,
    gate_b_stride: tl.tensor,
    UP_LOW_RANK: tl.tensor,
    up_low_rank_stride: tl.tensor,
    UP_B: tl.tensor,
    up_b_stride: tl.tensor,
    BIAS: tl.tensor,
    D_GATE_UP: tl.tensor,
    D_DOWN_A: tl.tensor,
    D_GATE_B: tl.tensor,
    D_UP_B: tl.tensor,
    AMAX: tl.tensor,
    rows: tl.tensor,
    F: tl.tensor,
    down_rank: tl.tensor,
    gate_rank: tl.tensor,
    up_rank: tl.tensor,
    rows_per_split: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    one: tl.tensor,
    zero: tl.tensor,
    SILU: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DEFERRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R_DOWN: tl.constexpr,
    BLOCK_R_GATE: tl.constexpr,
    BLOCK_R_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    # A program has a block of columns and a split of the rows; the splits' sums are added up afterwards. Blocks are
    # transposed, (columns, rows): so they are the left, high side of every matmul, which takes them from registers.
    split = tl.program_id(1)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    dtype = GATE_UP.dtype.element_ty
    if BLOCK_R_DOWN > 0:
        down = tl.arange(0, BLOCK_R_DOWN)[None, :]
        down_a_mask = (down < down_rank) & (column < F)
        down_a = tl.load(DOWN_A + down * F + column, mask=down_a_mask, other=0.0)
        d_down_a = tl.zeros([BLOCK_N, BLOCK_R_DOWN], tl.float32)
    if BLOCK_R_GATE > 0:
        d_gate_b = tl.zeros([BLOCK_N, BLOCK_R_GATE], tl.float32)
    if BLOCK_R_UP > 0:
        d_up_b = tl.zeros([BLOCK_N, BLOCK_R_UP], tl.float32)
    if HAS_DEFERRED:
        if BLOCK_R_GATE > 0:
            gate_b = _load_rows(GATE_B, gate_b_stride, column, F, gate_rank, BLOCK_R_GATE)
        if BLOCK_R_UP > 0:
            up_b = _load_rows(UP_B, up_b_stride, column, F, up_rank, BLOCK_R_UP)
        if HAS_BIAS:
            gate_bias = tl.load(BIAS + column, mask=column < F, other=0.0).to(tl.float32)
            up_bias = tl.load(BIAS + F + column, mask=column < F, other=0.0).to(tl.float32)
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, rows), BLOCK_M):
        flat = start + tl.arange(0, BLOCK_M)
        row = flat[None, :]
        long_row = row.to(tl.int64)
        inside = (row < rows) & (column < F)
        gate_at = long_row * 2 * F + column
        grad = tl.load(GRAD + long_row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(GATE_UP + gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(GATE_UP + gate_at + F, mask=inside, other=0.0).to(tl.float32)
        if BLOCK_R_GATE > 0:
            gate_low_rank = _load_rows(
                GATE_LOW_RANK, gate_low_rank_stride, flat[:, None], rows, gate_rank, BLOCK_R_GATE
            )
        if BLOCK_R_UP > 0:
            up_low_rank = _load_rows(UP_LOW_RANK, up_low_rank_stride, flat[:, None], rows, up_rank, BLOCK_R_UP)
        if BLOCK_R_DOWN > 0:
            d_down_low_rank = _load_rows(
                D_DOWN_LOW_RANK, d_down_low_rank_stride, flat[:, None], rows, down_rank, BLOCK_R_DOWN
            )
            lora_grad = tl.dot(down_a, tl.trans(d_down_low_rank))
        if HAS_DEFERRED:
            if BLOCK_R_GATE > 0:
                gate = _add_matmul(gate, gate_b, tl.trans(gate_low_rank), one)
            if BLOCK_R_UP > 0:
                up = _add_matmul(up, up_b, tl.trans(up_low_rank), one)
            if HAS_BIAS:
                gate += gate_bias
                up += up_bias
            gate = gate.to(dtype).to(tl.float32)
            up = up.to(dtype).to(tl.float32)
        elif BLOCK_R_DOWN > 0:
            # `zero` is 0, unknown to the compiler, which else lays these out as they are loaded and the matmuls'
            # accumulators otherwise, and computes the activation in both.
            gate += lora_grad * zero
            up += lora_grad * zero
        value, slope = _activation_and_slope(gate, SILU)
        if BLOCK_R_DOWN > 0:
            hidden = (value * up).to(dtype)
            if HAS_DROPOUT:
                kept = keep_mask(row, column, seed, threshold)
                lora_grad = tl.where(kept, lora_grad * scale, 0.0)
                hidden = tl.where(kept, hidden, 0.0)
            grad += lora_grad * one
            d_down_a = tl.dot(hidden, d_down_low_rank, d_down_a)
        d_gate = (grad * up * slope).to(dtype)
        d_up = (grad * value).to(dtype)
        tl.store(D_GATE_UP + gate_at, d_gate, mask=inside)
        tl.store(D_GATE_UP + gate_at + F, d_up, mask=inside)
        if HAS_DEFERRED:  # the largest of several is the same in whatever order they come
            amax = tl.max(tl.maximum(tl.abs(d_gate.to(tl.float32)), tl.abs(d_up.to(tl.float32))), 0)
            tl.atomic_max(AMAX + flat, amax, mask=flat < rows, sem="relaxed")
        if BLOCK_R_GATE > 0:
            d_gate_b = tl.dot(d_gate, gate_low_rank, d_gate_b)
        if BLOCK_R_UP > 0:
            d_up_b = tl.dot(d_up, up_low_rank, d_up_b)
    if BLOCK_R_DOWN > 0:
        if HAS_DROPOUT:
            d_down_a *= scale
        tl.store(D_DOWN_A + (split * down_rank + down) * F + column, d_down_a, mask=down_a_mask)
    if BLOCK_R_GATE > 0:
        rank = tl.arange(0, BLOCK_R_GATE)[None, :]
        at = (split * F + column) * gate_rank + rank
        tl.store(D_GATE_B + at, d_gate_b, mask=(column < F) & (rank < gate_rank))
    if BLOCK_R_UP > 0:
        rank = tl.arange(0, BLOCK_R_UP)[None, :]
        at = (split * F + column) * up_rank + rank
        tl.store(D_UP_B + at, d_up_b, mask=(column < F) & (rank < up_rank))
