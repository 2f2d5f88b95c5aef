"""Matmuls with frozen weights in fp8 (e4m3, Micikevicius et al. 2022, arXiv:2209.05433) with rowwise scales.

For GPUs of compute capability 8.9 and later. Every row of activations or gradients is divided by a scale of its own, so
that its largest absolute value, amax, becomes the largest of the format; weights have a scale an output for the forward
direction and, quantised once more, a scale an input for the backward one. `torch._scaled_mm` multiplies and puts the
scales back. LoRA is added in 16 bits. One value in e4m3, with three bits of mantissa, is off by at most 2^-4 of itself,
2.6 % in the mean square; a matmul of two such matrices by 3.7 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.weak import TensorWeakRef

from adder.kernels import tiles
from adder.kernels.triton_utils import jit, next_power_of_2, runs_kernels, tl, triton

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
# A row whose amax is below this counts as zeros: its scale must not be 0.
MIN_AMAX = 1e-12
# torch._scaled_mm asks that both sides of a weight are multiples of this.
SIZE_MULTIPLE = 16
# Up to this width a program holds a row from end to end and reads it once.
MAX_SINGLE_PASS_WIDTH = 32768
# Of quantise_and_matmul: how often K is split, and the largest rank that it takes.
SPLITS, MAX_RANK = 4, 128


@dataclass
class RowwiseFp8:
    """A matrix in fp8 with rowwise scales: `values`, float8_e4m3fn (rows, width), times `scales`, fp32 (rows, 1).

    Both are contiguous.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        """What the matrix stands for, fp32."""
        return self.values.float() * self.scales


class Fp8Memory:
    """Memory for the fp8 form of one weight at a time, which all layers share: 3 bytes a value of the largest.

    `dtype`: of the weights that are quantised, 16 bits.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.elements = self.rows = 0
        self.values: torch.Tensor | None = None

    def reserve(self, outputs: int, inputs: int) -> None:
        """Make room for a weight (outputs, inputs), in both directions."""
        self.elements, self.rows = max(self.elements, outputs * inputs), max(self.rows, outputs, inputs)

    def quantised(self, weight: torch.Tensor, transposed: bool) -> RowwiseFp8:
        """W (outputs, inputs), strided, or its transpose in fp8; it lasts until the next is asked for."""
        if self.values is None or self.values.numel() < self.elements:
            self.values = torch.empty(self.elements, dtype=torch.float8_e4m3fn, device=self.device)
            self.scales = torch.empty(self.rows, 1, dtype=torch.float32, device=self.device)
            self.turned = torch.empty(self.elements, dtype=self.dtype, device=self.device)
        if transposed:
            turned = self.turned[: weight.numel()].view(weight.shape[1], weight.shape[0])
            weight = turned.copy_(weight.t())
        rows, width = weight.shape
        return quantise(weight, RowwiseFp8(self.values[: rows * width].view(rows, width), self.scales[:rows]))


class UnpackedFp8Weight:
    """As Fp8Weight, made anew for each matmul of a weight that is held otherwise, in NF4: nothing of it is kept."""

    nbytes = 0

    def __init__(self, unpacked: Callable[[], torch.Tensor], memory: Fp8Memory):
        self.unpacked, self.memory = unpacked, memory

    @property
    def forward(self) -> RowwiseFp8:
        """W in fp8, until the next weight is asked for."""
        return self.memory.quantised(self.unpacked(), transposed=False)

    @property
    def backward(self) -> RowwiseFp8:
        """Wᵀ in fp8, until the next weight is asked for."""
        return self.memory.quantised(self.unpacked(), transposed=True)


class Fp8Weight:
    """A frozen weight W (outputs, inputs) in fp8, as it is and transposed for backward: 2 bytes a value."""

    def __init__(self, weight: torch.Tensor):
        self.forward = quantise(weight)
        self.backward = quantise(weight.t().contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes of both copies and their scales."""
        sides = (self.forward, self.backward)
        return sum(side.values.nbytes + side.scales.nbytes for side in sides)


def empty_fp8(rows: int, width: int, device: torch.device) -> RowwiseFp8:
    """Memory for a quantised matrix."""
    return RowwiseFp8(
        torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


def quantise(x: torch.Tensor, out: RowwiseFp8 | None = None) -> RowwiseFp8:
    """Quantise a matrix (rows, width), strided, with a scale a row; into `out` where that is given."""
    if not runs_kernels(x, "fp8"):
        return quantise_reference(x, out)
    rows, width = x.shape
    result = out or empty_fp8(rows, width, x.device)
    single_pass = width <= MAX_SINGLE_PASS_WIDTH
    block = next_power_of_2(width) if single_pass else 4096
    num_warps = 16 if block > 8192 else 8 if block > 2048 else 4
    _quantise[(rows,)](x, x.stride(0), result.values, result.scales, width, single_pass, block, num_warps=num_warps)
    return result


def quantise_reference(x: torch.Tensor, out: RowwiseFp8 | None = None) -> RowwiseFp8:
    """As quantise."""
    x_fp32 = x.float()
    scales = x_fp32.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / FP8_MAX
    values = (x_fp32 / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if out is None:
        return RowwiseFp8(values, scales)
    out.values.copy_(values)
    out.scales.copy_(scales)
    return out


def quantise_and_matmul(x: torch.Tensor, amax: torch.Tensor, b: torch.Tensor) -> tuple[RowwiseFp8, torch.Tensor]:
    """Quantise x and return x · b, (rows, rank), as well, by reading x once.

    x: (rows, width), contiguous. amax: its rows' largest absolute values, fp32 (rows,). b: (width, rank), strided.
    """
    rank = b.shape[1]
    if not 0 < rank <= MAX_RANK or not runs_kernels(x, "fp8"):
        return quantise(x), torch.mm(x, b)
    rows, width = x.shape
    result = empty_fp8(rows, width, x.device)
    tile = tiles.quantise_and_matmul_tile(tiles.card_of(x.device), next_power_of_2(rank))
    partial_sums = torch.empty(SPLITS, rows, rank, dtype=torch.float32, device=x.device)
    _quantise_and_matmul[(triton.cdiv(rows, tile.block_m), SPLITS)](
        x,
        amax,
        b,
        b.stride(0),
        result.values,
        result.scales,
        partial_sums,
        rows,
        width,
        rank,
        triton.cdiv(triton.cdiv(width, SPLITS), tile.block_n) * tile.block_n,
        tile.block_m,
        tile.block_n,
        next_power_of_2(rank),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return result, partial_sums.sum(0).to(x.dtype)


# The matrix whose fp8 values are at hand (it isn't kept alive), its version, and these.
_cached: tuple[TensorWeakRef, int, RowwiseFp8] | None = None


def cache_fp8(x: torch.Tensor, fp8: RowwiseFp8) -> None:
    """Keep x's fp8 values for the next quantise_cached: what writes a gradient has them cheaper than what reads it."""
    global _cached
    _cached = TensorWeakRef(x), x._version, fp8


def quantise_cached(x: torch.Tensor) -> RowwiseFp8:
    """As quantise; a contiguous x whose values were cached last, and that hasn't changed since, takes these."""
    global _cached
    cached, _cached = _cached, None
    if cached is None:
        return quantise(x)
    reference, version, fp8 = cached
    known = reference()
    # It lives, so its address is nobody else's; x may be a view of it.
    same = known is not None and (x.data_ptr(), x.shape, x._version) == (known.data_ptr(), known.shape, version)
    return fp8 if same and x.is_contiguous() else quantise(x)


def matmul(x: RowwiseFp8, weight: RowwiseFp8, dtype: torch.dtype) -> torch.Tensor:
    """x · weightᵀ in `dtype` (on a GPU bf16 alone). x: (tokens, K); weight: (N, K); 16 divides K and N."""
    if not x.values.is_cuda:
        return matmul_reference(x, weight).to(dtype)
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]  the only fp8 matmul with rowwise scales
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scales.t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def matmul_reference(x: RowwiseFp8, weight: RowwiseFp8) -> torch.Tensor:
    """As matmul, in fp32."""
    return x.dequantised() @ weight.dequantised().t()


def add_lora(
    y: torch.Tensor,
    low_rank: torch.Tensor,
    b: torch.Tensor,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Add LoRA's low_rank · bᵀ, and `residual` and `bias` where given, to y in place, all in one pass.

    y, residual: (tokens, N) contiguous. low_rank = x·Aᵀ: (tokens, rank) and b = s·B: (N, rank), strided. bias: (N,).
    """
    if not runs_kernels(y, "fp8"):
        return add_lora_reference(y, low_rank, b, residual, bias)
    (rows, width), rank = y.shape, b.shape[1]
    _add_lora[(triton.cdiv(rows, 64), triton.cdiv(width, 128))](
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
        min(64, next_power_of_2(rank)) if rank else 16,
        num_warps=4,
    )


def add_lora_reference(
    y: torch.Tensor,
    low_rank: torch.Tensor,
    b: torch.Tensor,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """As add_lora."""
    total = y.float() + low_rank.float() @ b.float().t()
    for more in (residual, bias):
        total = total if more is None else total + more.float()
    y.copy_(total)


@jit
def scale_of_amax(amax: tl.tensor) -> tl.tensor:
    """The scale of a row whose largest absolute value is `amax`: for kernels that quantise what they have made."""
    return tl.maximum(amax, 1e-12) / 448.0


@jit
def store_row_as_fp8(
    y: tl.tensor, VALUES: tl.tensor, SCALES: tl.tensor, row: tl.tensor, column: tl.tensor, K: tl.tensor
) -> None:
    """Store a row of K values and its scale. y: fp32, as rounded where it is stored in 16 bits too, 0 beyond K."""
    scale = scale_of_amax(tl.max(tl.abs(y), 0))
    tl.store(SCALES + row, scale)
    tl.store(VALUES + row * K + column, (y / scale).to(tl.float8e4nv), mask=column < K)


@jit
def _quantise(
    X: tl.tensor,
    x_stride: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    K: tl.tensor,
    SINGLE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if SINGLE_PASS:
        column = tl.arange(0, BLOCK)
        x = tl.load(X + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
        scale = scale_of_amax(tl.max(tl.abs(x), 0))
        tl.store(VALUES + row * K + column, (x / scale).to(tl.float8e4nv), mask=column < K)
    else:
        amax = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(x))
        scale = scale_of_amax(tl.max(amax, 0))
        for start in range(0, K, BLOCK):  # the second time out of the cache
            column = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
            tl.store(VALUES + row * K + column, (x / scale).to(tl.float8e4nv), mask=column < K)
    tl.store(SCALES + row, scale)


@jit
def _quantise_and_matmul(
    X: tl.tensor,
    AMAX: tl.tensor,
    B: tl.tensor,
    b_stride: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    PARTIAL_SUMS: tl.tensor,
    rows: tl.tensor,
    K: tl.tensor,
    RANK: tl.tensor,
    columns_per_split: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    flat = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    row = flat[:, None]
    long_row = row.to(tl.int64)
    scale = scale_of_amax(tl.load(AMAX + flat, mask=flat < rows, other=0.0))
    if split == 0:
        tl.store(SCALES + flat, scale, mask=flat < rows)
    across = tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(split * columns_per_split, min((split + 1) * columns_per_split, K), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)[None, :]
        down = start + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < rows) & (column < K)
        x = tl.load(X + long_row * K + column, mask=inside, other=0.0)
        b = tl.load(B + down.to(tl.int64) * b_stride + across, mask=(down < K) & (across < RANK), other=0.0)
        tl.store(VALUES + long_row * K + column, (x.to(tl.float32) / scale[:, None]).to(tl.float8e4nv), mask=inside)
        total = tl.dot(x, b, total)
    at = (split * rows + long_row) * RANK + across
    tl.store(PARTIAL_SUMS + at, total, mask=(row < rows) & (across < RANK))


@jit
def _add_lora(
    Y: tl.tensor,
    LOW_RANK: tl.tensor,
    low_rank_stride: tl.tensor,
    B: tl.tensor,
    b_stride: tl.tensor,
    RESIDUAL: tl.tensor,
    BIAS: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    RANK: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    long_row = row.to(tl.int64)
    inside = (row < rows) & (column < N)
    at = long_row * N + column
    total = tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, RANK, BLOCK_R):
        across = start + tl.arange(0, BLOCK_R)[None, :]
        down = start + tl.arange(0, BLOCK_R)[:, None]
        low_rank = tl.load(
            LOW_RANK + long_row * low_rank_stride + across, mask=(row < rows) & (across < RANK), other=0.0
        )
        b = tl.load(B + column * b_stride + down, mask=(column < N) & (down < RANK), other=0.0)
        total = tl.dot(low_rank, b, total)
    if HAS_RESIDUAL:
        total += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(Y + at, total, mask=inside)
