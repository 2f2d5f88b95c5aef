"""Dropout of a LoRA pair's input inside its thin products, as Triton kernels.

The mask is a hash of seed, row and column, so that forward and backward make the same one and none is stored.
"Strided": rows may lie further apart than they are long.
"""

from __future__ import annotations

import torch

from adder.kernels.triton_utils import jit, runs_kernels, tl, triton, width_of


def dropout_mask(seed: int, rows: int, width: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask of the functions below, bool (rows, width): True is kept. A number is dropped with probability p."""
    row = _mix(torch.arange(rows, device=device) ^ seed)
    return _mix((row[:, None] + torch.arange(width, device=device)) & 0xFFFFFFFF) >= threshold_of(p)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Chris Wellons' lowbias32, a hash of 32-bit numbers (https://nullprogram.com/blog/2018/07/31/)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def threshold_of(p: float) -> int:
    """The 32-bit number that hashes stay below with probability p."""
    return min(int(p * 2**32), 2**32 - 1)


@jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def kept_numbers(row, column, seed, threshold):
    """dropout_mask within a kernel."""
    mixed = _mixed(row.to(tl.uint32) ^ seed.to(tl.uint32))
    return _mixed(mixed + column.to(tl.uint32)) >= threshold.to(tl.uint32)


def dropped_product(x: torch.Tensor, a: torch.Tensor, seed: int, p: float, out: torch.Tensor) -> None:
    """Write dropout(x) · aᵀ into `out`. x: (tokens, width) and out: (tokens, rank), strided; a: (rank, width)."""
    if not runs_kernels(x):
        return dropped_product_reference(x, a, seed, p, out)
    (rows, width), rank = x.shape, a.shape[0]
    _dropped_product[(triton.cdiv(rows, 64),)](
        x,
        x.stride(0),
        a,
        out,
        out.stride(0),
        rows,
        width,
        rank,
        seed,
        threshold_of(p),
        1 / (1 - p),
        width_of(rank),
        64,
        64,
    )


def dropped_product_reference(x, a, seed, p, out):
    """As dropped_product."""
    mask = dropout_mask(seed, *x.shape, p, x.device)
    out.copy_((x.float() * mask) @ a.float().t() / (1 - p))


def dropped_weight_grad(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """Return gradᵀ · dropout(x), fp32 (rank, width). grad: (tokens, rank) and x: (tokens, width), both strided."""
    if not runs_kernels(x):
        return dropped_weight_grad_reference(grad, x, seed, p)
    (rows, width), rank = x.shape, grad.shape[1]
    # Enough programs to fill the card; each sums over a share of the rows, and the shares are added in a fixed order.
    per_share = max(256, triton.cdiv(triton.cdiv(rows, 16), 64) * 64)
    shares = triton.cdiv(rows, per_share)
    parts = torch.empty(shares, rank, width, device=x.device, dtype=torch.float32)
    _dropped_weight_grad[(triton.cdiv(width, 128), shares)](
        grad,
        grad.stride(0),
        x,
        x.stride(0),
        parts,
        rows,
        width,
        rank,
        per_share,
        seed,
        threshold_of(p),
        1 / (1 - p),
        width_of(rank),
        64,
        128,
    )
    return parts.sum(0)


def dropped_weight_grad_reference(grad, x, seed, p):
    """As dropped_weight_grad."""
    mask = dropout_mask(seed, *x.shape, p, x.device)
    return grad.float().t() @ (x.float() * mask) / (1 - p)


def add_dropped_input_grad(total: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, seed: int, p: float) -> None:
    """Add dropout's gradient, mask · (grad · a) / (1 - p), to `total` in place.

    total: (tokens, width) and grad: (tokens, rank), both strided; a: (rank, width), contiguous.
    """
    if not runs_kernels(total):
        return add_dropped_input_grad_reference(total, grad, a, seed, p)
    (rows, width), rank = total.shape, a.shape[0]
    _add_dropped_input_grad[(triton.cdiv(rows, 64), triton.cdiv(width, 128))](
        total,
        total.stride(0),
        grad,
        grad.stride(0),
        a,
        rows,
        width,
        rank,
        seed,
        threshold_of(p),
        1 / (1 - p),
        width_of(rank),
        64,
        128,
    )


def add_dropped_input_grad_reference(total, grad, a, seed, p):
    """As add_dropped_input_grad."""
    mask = dropout_mask(seed, *total.shape, p, total.device)
    total.copy_(total.float() + mask * (grad.float() @ a.float()) / (1 - p))


@jit
def _dropped_product(
    X,
    x_stride,
    A,
    OUT,
    out_stride,
    rows,
    K,
    RANK,
    seed,
    threshold,
    scale,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    long_row = row.to(tl.int64)
    rank = tl.arange(0, R)
    total = tl.zeros([BM, R], tl.float32)
    for start in range(0, K, BK):
        column = start + tl.arange(0, BK)[None, :]
        x = tl.load(X + long_row * x_stride + column, mask=(row < rows) & (column < K), other=0.0)
        x = tl.where(kept_numbers(row, column, seed, threshold), x, 0.0)
        down = start + tl.arange(0, BK)[:, None]
        a = tl.load(A + rank[None, :] * K + down, mask=(rank[None, :] < RANK) & (down < K), other=0.0)
        total = tl.dot(x.to(a.dtype), a, total)
    at = OUT + long_row * out_stride + rank[None, :]
    tl.store(at, total * scale, mask=(row < rows) & (rank[None, :] < RANK))


@jit
def _dropped_weight_grad(
    GRAD,
    grad_stride,
    X,
    x_stride,
    PARTS,
    rows,
    K,
    RANK,
    per_share,
    seed,
    threshold,
    scale,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    share = tl.program_id(1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    rank = tl.arange(0, R)[:, None]
    total = tl.zeros([R, BN], tl.float32)
    first = share * per_share
    for start in range(first, min(first + per_share, rows), BM):
        row = start + tl.arange(0, BM)[:, None]
        across = start + tl.arange(0, BM)[None, :]
        x = tl.load(X + row.to(tl.int64) * x_stride + column, mask=(row < rows) & (column < K), other=0.0)
        x = tl.where(kept_numbers(row, column, seed, threshold), x, 0.0)
        grad = tl.load(GRAD + across.to(tl.int64) * grad_stride + rank, mask=(across < rows) & (rank < RANK), other=0.0)
        total = tl.dot(grad, x.to(grad.dtype), total)
    at = PARTS + (share * RANK + rank) * K + column
    tl.store(at, total * scale, mask=(rank < RANK) & (column < K))


@jit
def _add_dropped_input_grad(
    TOTAL,
    total_stride,
    GRAD,
    grad_stride,
    A,
    rows,
    K,
    RANK,
    seed,
    threshold,
    scale,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    across = tl.arange(0, R)[None, :]
    down = tl.arange(0, R)[:, None]
    long_row = row.to(tl.int64)
    grad = tl.load(GRAD + long_row * grad_stride + across, mask=(row < rows) & (across < RANK), other=0.0)
    a = tl.load(A + down * K + column, mask=(down < RANK) & (column < K), other=0.0)
    added = tl.dot(grad, a) * scale
    at = TOTAL + long_row * total_stride + column
    inside = (row < rows) & (column < K)
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total + tl.where(kept_numbers(row, column, seed, threshold), added, 0.0), mask=inside)
