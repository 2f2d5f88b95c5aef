"""Products with frozen weights in fp8 (e4m3, three bits of mantissa), for GPUs of compute capability 9.0 and later.

Every row of activations or gradients is divided by a scale of its own, so that its largest number becomes the largest
of the format; weights have a scale an output for the forward direction and, quantised once more, a scale an input for
the backward one. `torch._scaled_mm` multiplies and puts the scales back. A LoRA pair's share is added in 16 bits.
One number in e4m3 is off by at most 2^-4 of itself, 2.6 % in the mean square; a product of two such matrices by 3.7 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import TensorWeakRef

from adder.kernels.triton_utils import Tile, jit, runs_kernels, tl, triton, width_of

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
# Below this a row counts as zeros: its scale must not be 0.
SMALLEST = 1e-12
# torch._scaled_mm asks that both sides of a weight are multiples of this.
STEP = 16
# Up to this width a program holds a whole row and reads it once.
WHOLE_ROW = 32768
# Of quantise_and_multiply: a program's tile, into how many parts rows are split, and the widest b that it takes.
MULTIPLY_TILE, SPLITS, WIDEST_B = Tile(64, 128, 4, 4), 4, 128


@dataclass
class Fp8Rows:
    """A matrix in fp8: `values`, float8_e4m3fn (rows, width), times `scales`, fp32 (rows, 1), both contiguous."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        """What the matrix stands for, fp32."""
        return self.values.float() * self.scales


class Fp8Weight:
    """A frozen weight W (outputs, inputs) in fp8, once for each direction of a product: 2 bytes a number."""

    def __init__(self, weight: torch.Tensor):
        self.forward = quantise(weight)
        self.backward = quantise(weight.t().contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes of both copies and their scales."""
        sides = (self.forward, self.backward)
        return sum(side.values.nbytes + side.scales.nbytes for side in sides)


def empty_rows(rows: int, width: int, device: torch.device) -> Fp8Rows:
    """Memory for a quantised matrix."""
    return Fp8Rows(
        torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


def quantise(x: torch.Tensor) -> Fp8Rows:
    """Quantise a matrix (rows, width) with a scale a row. Its rows may lie further apart than they are long."""
    if not runs_kernels(x):
        return quantise_reference(x)
    found = empty_rows(*x.shape, x.device)
    whole = x.shape[1] <= WHOLE_ROW
    block = width_of(x.shape[1]) if whole else 4096
    warps = 16 if block > 8192 else 8 if block > 2048 else 4
    _quantise[(x.shape[0],)](x, x.stride(0), found.values, found.scales, x.shape[1], whole, block, num_warps=warps)
    return found


def quantise_reference(x: torch.Tensor) -> Fp8Rows:
    """As quantise."""
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return Fp8Rows((wide / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales)


def quantise_and_multiply(x: torch.Tensor, largest: torch.Tensor, b: torch.Tensor) -> tuple[Fp8Rows, torch.Tensor]:
    """Quantise x and return x · b, (rows, rank), as well, by reading x once.

    x: (rows, width), contiguous. largest: its rows' largest absolute numbers, fp32 (rows,). b: (width, rank), strided.
    """
    rank = b.shape[1]
    if not 0 < rank <= WIDEST_B or not runs_kernels(x):
        return quantise(x), torch.mm(x, b)
    rows, width = x.shape
    found = empty_rows(rows, width, x.device)
    tile, splits = MULTIPLY_TILE, SPLITS
    sums = torch.empty(splits, rows, rank, dtype=torch.float32, device=x.device)
    _quantise_and_multiply[(triton.cdiv(rows, tile.rows), splits)](
        x,
        largest,
        b,
        b.stride(0),
        found.values,
        found.scales,
        sums,
        rows,
        width,
        rank,
        triton.cdiv(triton.cdiv(width, splits), tile.columns) * tile.columns,
        tile.rows,
        tile.columns,
        width_of(rank),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return found, sums.sum(0).to(x.dtype)


# The matrix whose fp8 values are at hand (it isn't kept alive), its version, and these.
_remembered: tuple[TensorWeakRef, int, Fp8Rows] | None = None


def remember(x: torch.Tensor, rows: Fp8Rows) -> None:
    """Keep x's fp8 values for the next `quantised`: what writes a gradient has them cheaper than what reads it."""
    global _remembered
    _remembered = TensorWeakRef(x), x._version, rows


def quantised(x: torch.Tensor) -> Fp8Rows:
    """As quantise; a contiguous x whose values were remembered last, and that hasn't changed since, takes these."""
    global _remembered
    (reference, version, rows), _remembered = _remembered or (lambda: None, 0, None), None
    known = reference()
    # It lives, so its address is nobody else's; x may be a view of it.
    same = known is not None and (x.data_ptr(), x.shape, x._version) == (known.data_ptr(), known.shape, version)
    return rows if same and x.is_contiguous() else quantise(x)


def product(rows: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> torch.Tensor:
    """rows · weightᵀ in `dtype` (on a GPU bf16 alone). rows: (tokens, K); weight: (N, K); 16 divides K and N."""
    if not rows.values.is_cuda:
        return product_reference(rows, weight).to(dtype)
    return torch._scaled_mm(
        rows.values,
        weight.values.t(),
        scale_a=rows.scales,
        scale_b=weight.scales.t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def product_reference(rows: Fp8Rows, weight: Fp8Rows) -> torch.Tensor:
    """As product, in fp32."""
    return rows.dequantised() @ weight.dequantised().t()


def add_low_rank(
    y: torch.Tensor,
    low_rank: torch.Tensor,
    b: torch.Tensor,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Add low_rank · bᵀ, and `residual` and `bias` where given, to y in place, all in one pass.

    y, residual: (tokens, N) contiguous. low_rank: (tokens, rank) and b: (N, rank), rows maybe apart. bias: (N,).
    """
    if not runs_kernels(y):
        return add_low_rank_reference(y, low_rank, b, residual, bias)
    (rows, width), rank = y.shape, b.shape[1]
    _add_low_rank[(triton.cdiv(rows, 64), triton.cdiv(width, 128))](
        y,
        low_rank,
        low_rank.stride(0),
        b,
        b.stride(0),
        y if residual is None else residual,
        y if bias is None else bias,
        rows,
        width,
        rank,
        residual is not None,
        bias is not None,
        64,
        128,
        min(64, width_of(rank)) if rank else 16,
        num_warps=4,
    )


def add_low_rank_reference(y, low_rank, b, residual=None, bias=None):
    """As add_low_rank."""
    total = y.float() + low_rank.float() @ b.float().t()
    for more in (residual, bias):
        total = total if more is None else total + more.float()
    y.copy_(total)


@jit
def fp8_scale(largest):
    """The scale of a row whose largest number is `largest`: for kernels that quantise what they have made."""
    return tl.maximum(largest, 1e-12) / 448.0


@jit
def _quantise(X, x_stride, VALUES, SCALES, K, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if WHOLE:
        column = tl.arange(0, BLOCK)
        x = tl.load(X + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
        scale = fp8_scale(tl.max(tl.abs(x), 0))
        tl.store(VALUES + row * K + column, (x / scale).to(tl.float8e4nv), mask=column < K)
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
        scale = fp8_scale(tl.max(largest, 0))
        for start in range(0, K, BLOCK):  # the second time out of the cache
            column = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
            tl.store(VALUES + row * K + column, (x / scale).to(tl.float8e4nv), mask=column < K)
    tl.store(SCALES + row, scale)


@jit
def _quantise_and_multiply(
    X,
    LARGEST,
    B,
    b_stride,
    VALUES,
    SCALES,
    SUMS,
    rows,
    K,
    RANK,
    per_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    flat = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    row = flat[:, None]
    long_row = row.to(tl.int64)
    scale = fp8_scale(tl.load(LARGEST + flat, mask=flat < rows, other=0.0))
    if split == 0:
        tl.store(SCALES + flat, scale, mask=flat < rows)
    across = tl.arange(0, BR)[None, :]
    total = tl.zeros([BM, BR], tl.float32)
    for start in range(split * per_split, min((split + 1) * per_split, K), BN):
        column = start + tl.arange(0, BN)[None, :]
        down = start + tl.arange(0, BN)[:, None]
        inside = (row < rows) & (column < K)
        x = tl.load(X + long_row * K + column, mask=inside, other=0.0)
        b = tl.load(B + down.to(tl.int64) * b_stride + across, mask=(down < K) & (across < RANK), other=0.0)
        tl.store(VALUES + long_row * K + column, (x.to(tl.float32) / scale[:, None]).to(tl.float8e4nv), mask=inside)
        total = tl.dot(x, b, total)
    at = (split * rows + long_row) * RANK + across
    tl.store(SUMS + at, total, mask=(row < rows) & (across < RANK))


@jit
def _add_low_rank(
    Y,
    LOW,
    low_stride,
    B,
    b_stride,
    RESIDUAL,
    BIAS,
    rows,
    N,
    RANK,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    long_row = row.to(tl.int64)
    inside = (row < rows) & (column < N)
    at = long_row * N + column
    total = tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, RANK, BR):
        across = start + tl.arange(0, BR)[None, :]
        down = start + tl.arange(0, BR)[:, None]
        low = tl.load(LOW + long_row * low_stride + across, mask=(row < rows) & (across < RANK), other=0.0)
        b = tl.load(B + column * b_stride + down, mask=(column < N) & (down < RANK), other=0.0)
        total = tl.dot(low, b, total)
    if HAS_RESIDUAL:
        total += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(Y + at, total, mask=inside)
