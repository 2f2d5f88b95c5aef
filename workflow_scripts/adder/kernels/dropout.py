"""LoRA's dropout inside the matmuls with A, as Triton kernels.

LoRA drops its own input alone: y = x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ. The dropout mask is a hash of seed, row and column, as
counter-based generators have it, so that forward and backward make the same one and none is stored.
"Strided": rows may lie further apart than they are long.
"""

from __future__ import annotations

import torch

from adder.kernels import tiles
from adder.kernels.triton_utils import jit, matmul_fp32, next_power_of_2, runs_kernels, tl, triton


def dropout_mask(seed: int, rows: int, width: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """The dropout mask of the functions below, bool (rows, width): True is kept. Values drop with probability p."""
    row = _lowbias32(torch.arange(rows, device=device) ^ seed)
    return _lowbias32((row[:, None] + torch.arange(width, device=device)) & 0xFFFFFFFF) >= drop_threshold(p)


def _lowbias32(x: torch.Tensor) -> torch.Tensor:
    """Chris Wellons' lowbias32, a hash of 32-bit integers (https://nullprogram.com/blog/2018/07/31/)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def drop_threshold(p: float) -> int:
    """The 32-bit integer that hashes stay below with probability p."""
    return min(int(p * 2**32), 2**32 - 1)


@jit
def _lowbias32_triton(x: tl.tensor) -> tl.tensor:
    """As _lowbias32, within a kernel."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def keep_mask(row: tl.tensor, column: tl.tensor, seed: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """As dropout_mask, within a kernel."""
    row_hash = _lowbias32_triton(row.to(tl.uint32) ^ seed.to(tl.uint32))
    return _lowbias32_triton(row_hash + column.to(tl.uint32)) >= threshold.to(tl.uint32)


# On cards whose matmuls Triton doesn't know torch multiplies what a kernel has dropped --------------------------------


def dropped(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """mask · x / (1 - p) with dropout_mask's mask, contiguous, in x's dtype. x: (rows, width), strided."""
    if not runs_kernels(x, "dropout_values"):
        return dropped_reference(x, seed, p)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = min(1024, next_power_of_2(width))
    _dropped[(rows, triton.cdiv(width, block))](
        x, x.stride(0), out, width, seed, drop_threshold(p), 1 / (1 - p), block, num_warps=4
    )
    return out


def dropped_reference(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """As dropped."""
    rows, width = x.shape
    return (x.float() * dropout_mask(seed, rows, width, p, x.device) / (1 - p)).to(x.dtype)


def _dropout_matmul_by_torch(x: torch.Tensor, a: torch.Tensor, seed: int, p: float, out: torch.Tensor) -> None:
    if not runs_kernels(x, "dropout_values"):
        return dropout_matmul_reference(x, a, seed, p, out)
    torch.mm(dropped(x, seed, p), a.t(), out=out)


def _dropout_matmul_grad_a_by_torch(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    if not runs_kernels(x, "dropout_values"):
        return dropout_matmul_grad_a_reference(grad, x, seed, p)
    return matmul_fp32(grad.t(), dropped(x, seed, p))


def _add_dropout_matmul_grad_x_by_torch(
    total: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, seed: int, p: float
) -> None:
    if not runs_kernels(total, "dropout_values"):
        return add_dropout_matmul_grad_x_reference(total, grad, a, seed, p)
    total.add_(dropped(torch.mm(grad, a), seed, p))


def dropout_matmul(x: torch.Tensor, a: torch.Tensor, seed: int, p: float, out: torch.Tensor) -> None:
    """Write dropout(x) · aᵀ into `out`. x: (tokens, width) and out: (tokens, rank), strided; a: (rank, width).

    dropout(x) is mask · x / (1 - p), with dropout_mask's mask.
    """
    if not runs_kernels(x, "dropout"):
        return _dropout_matmul_by_torch(x, a, seed, p, out)
    (rows, width), rank = x.shape, a.shape[0]
    tile = tiles.dropout_tiles(rank).matmul
    _dropout_matmul[(triton.cdiv(rows, tile.block_m),)](
        x,
        x.stride(0),
        a,
        out,
        out.stride(0),
        rows,
        width,
        rank,
        seed,
        drop_threshold(p),
        1 / (1 - p),
        next_power_of_2(rank),
        tile.block_m,
        tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def dropout_matmul_reference(x: torch.Tensor, a: torch.Tensor, seed: int, p: float, out: torch.Tensor) -> None:
    """As dropout_matmul."""
    rows, width = x.shape
    mask = dropout_mask(seed, rows, width, p, x.device)
    out.copy_((x.float() * mask) @ a.float().t() / (1 - p))


def dropout_matmul_grad_a(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """Return A's gradient, gradᵀ · dropout(x), fp32 (rank, width).

    grad: gradient to dropout_matmul's output, (tokens, rank), and x: (tokens, width), both strided.
    """
    if not runs_kernels(x, "dropout"):
        return _dropout_matmul_grad_a_by_torch(grad, x, seed, p)
    (rows, width), rank = x.shape, grad.shape[1]
    tile = tiles.dropout_tiles(rank).grad_a
    # Split K (here the rows) to fill the card with programs; their sums are added in a fixed order.
    rows_per_split = max(256, triton.cdiv(triton.cdiv(rows, 16), tile.block_m) * tile.block_m)
    splits = triton.cdiv(rows, rows_per_split)
    partial_sums = torch.empty(splits, rank, width, device=x.device, dtype=torch.float32)
    _dropout_matmul_grad_a[(triton.cdiv(width, tile.block_n), splits)](
        grad,
        grad.stride(0),
        x,
        x.stride(0),
        partial_sums,
        rows,
        width,
        rank,
        rows_per_split,
        seed,
        drop_threshold(p),
        1 / (1 - p),
        next_power_of_2(rank),
        tile.block_m,
        tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partial_sums.sum(0)


def dropout_matmul_grad_a_reference(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """As dropout_matmul_grad_a."""
    rows, width = x.shape
    mask = dropout_mask(seed, rows, width, p, x.device)
    return grad.float().t() @ (x.float() * mask) / (1 - p)


def add_dropout_matmul_grad_x(total: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, seed: int, p: float) -> None:
    """Add the gradient to x, mask · (grad · a) / (1 - p), to `total` in place.

    total: (tokens, width) and grad: gradient to dropout_matmul's output, (tokens, rank), both strided; a: (rank,
    width), contiguous.
    """
    if not runs_kernels(total, "dropout"):
        return _add_dropout_matmul_grad_x_by_torch(total, grad, a, seed, p)
    (rows, width), rank = total.shape, a.shape[0]
    tile = tiles.dropout_tiles(rank).grad_x
    _add_dropout_matmul_grad_x[(triton.cdiv(rows, tile.block_m), triton.cdiv(width, tile.block_n))](
        total,
        total.stride(0),
        grad,
        grad.stride(0),
        a,
        rows,
        width,
        rank,
        seed,
        drop_threshold(p),
        1 / (1 - p),
        next_power_of_2(rank),
        tile.block_m,
        tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def add_dropout_matmul_grad_x_reference(
    total: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, seed: int, p: float
) -> None:
    """As add_dropout_matmul_grad_x."""
    rows, width = total.shape
    mask = dropout_mask(seed, rows, width, p, total.device)
    total.copy_(total.float() + mask * (grad.float() @ a.float()) / (1 - p))


@jit
def _dropped(
    X: tl.tensor,
    x_stride: tl.tensor,
    OUT: tl.tensor,
    K: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    x = tl.load(X + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    # A block of rows, of one: keep_mask takes both.
    keep = keep_mask(row + tl.zeros([BLOCK], tl.int32), column, seed, threshold)
    tl.store(OUT + row.to(tl.int64) * K + column, tl.where(keep, x * scale, 0.0), mask=inside)


@jit
def _dropout_matmul(
    X: tl.tensor,
    x_stride: tl.tensor,
    A: tl.tensor,
    OUT: tl.tensor,
    out_stride: tl.tensor,
    rows: tl.tensor,
    K: tl.tensor,
    RANK: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    long_row = row.to(tl.int64)
    rank = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(X + long_row * x_stride + column, mask=(row < rows) & (column < K), other=0.0)
        x = tl.where(keep_mask(row, column, seed, threshold), x, 0.0)
        down = start + tl.arange(0, BLOCK_K)[:, None]
        a = tl.load(A + rank[None, :] * K + down, mask=(rank[None, :] < RANK) & (down < K), other=0.0)
        total = tl.dot(x.to(a.dtype), a, total)
    at = OUT + long_row * out_stride + rank[None, :]
    tl.store(at, total * scale, mask=(row < rows) & (rank[None, :] < RANK))


@jit
def _dropout_matmul_grad_a(
    GRAD: tl.tensor,
    grad_stride: tl.tensor,
    X: tl.tensor,
    x_stride: tl.tensor,
    PARTIAL_SUMS: tl.tensor,
    rows: tl.tensor,
    K: tl.tensor,
    RANK: tl.tensor,
    rows_per_split: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rank = tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, rows), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)[:, None]
        across = start + tl.arange(0, BLOCK_M)[None, :]
        x = tl.load(X + row.to(tl.int64) * x_stride + column, mask=(row < rows) & (column < K), other=0.0)
        x = tl.where(keep_mask(row, column, seed, threshold), x, 0.0)
        grad = tl.load(GRAD + across.to(tl.int64) * grad_stride + rank, mask=(across < rows) & (rank < RANK), other=0.0)
        total = tl.dot(grad, x.to(grad.dtype), total)
    at = PARTIAL_SUMS + (split * RANK + rank) * K + column
    tl.store(at, total * scale, mask=(rank < RANK) & (column < K))


@jit
def _add_dropout_matmul_grad_x(
    TOTAL: tl.tensor,
    total_stride: tl.tensor,
    GRAD: tl.tensor,
    grad_stride: tl.tensor,
    A: tl.tensor,
    rows: tl.tensor,
    K: tl.tensor,
    RANK: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    across = tl.arange(0, BLOCK_R)[None, :]
    down = tl.arange(0, BLOCK_R)[:, None]
    long_row = row.to(tl.int64)
    grad = tl.load(GRAD + long_row * grad_stride + across, mask=(row < rows) & (across < RANK), other=0.0)
    a = tl.load(A + down * K + column, mask=(down < RANK) & (column < K), other=0.0)
    added = tl.dot(grad, a) * scale
    at = TOTAL + long_row * total_stride + column
    inside = (row < rows) & (column < K)
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total + tl.where(keep_mask(row, column, seed, threshold), added, 0.0), mask=inside)
