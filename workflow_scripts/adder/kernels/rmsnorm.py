"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) forward and backward as Triton kernels.

y = x · rstd · weight with rstd = 1 / sqrt(mean(x²) + eps) of each row. A program holds a row, so that x is read once;
backward needs only rstd from forward. Arithmetic is fp32, results are stored in the tensors' own dtype (bf16 or fp16).
"Strided": rows may lie further apart than they are long, the values of one row being next to each other.
"""

from __future__ import annotations

import torch

from adder.kernels.fp8 import RowwiseFp8, empty_fp8, quantise_reference, store_row_as_fp8
from adder.kernels.triton_utils import jit, next_power_of_2, num_warps_for, runs_kernels, tl


def rms_norm_into(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool, out: torch.Tensor, with_fp8: bool = False
) -> tuple[torch.Tensor, RowwiseFp8 | None]:
    """Write RMSNorm(x) into `out`, (tokens, width), strided; return rstd, fp32 (tokens,).

    x: (tokens, width), contiguous. `plus_one`: Gemma's norm, which multiplies by 1 + weight and rounds once; Llama's
    rounds the normalised value before it multiplies by weight. `with_fp8`: return what was written in fp8 as well.
    """
    if not runs_kernels(x, "rmsnorm"):
        return rms_norm_into_reference(x, weight, eps, plus_one, out, with_fp8)
    rows, width = x.shape
    rstd = torch.empty(rows, device=x.device, dtype=torch.float32)
    block = next_power_of_2(width)
    fp8 = empty_fp8(rows, width, x.device) if with_fp8 else None
    _rms_norm[(rows,)](
        x,
        weight,
        out,
        out.stride(0),
        rstd,
        out if fp8 is None else fp8.values,
        out if fp8 is None else fp8.scales,
        eps,
        width,
        plus_one,
        with_fp8,
        block,
        num_warps=num_warps_for(block),
    )
    return rstd, fp8


def rms_norm_into_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool, out: torch.Tensor, with_fp8: bool = False
) -> tuple[torch.Tensor, RowwiseFp8 | None]:
    """As rms_norm_into."""
    x_fp32 = x.float()
    rstd = torch.rsqrt(x_fp32.pow(2).mean(-1) + eps)
    out.copy_(_times_weight(x_fp32 * rstd[:, None], weight, plus_one, x.dtype))
    return rstd, quantise_reference(out) if with_fp8 else None


def _times_weight(normed: torch.Tensor, weight: torch.Tensor, plus_one: bool, dtype: torch.dtype) -> torch.Tensor:
    return normed * (1 + weight.float()) if plus_one else normed.to(dtype).float() * weight.float()


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    plus_one: bool,
    residual: torch.Tensor | None,
    with_fp8: bool = False,
) -> tuple[torch.Tensor, RowwiseFp8 | None]:
    """Return the gradient to x, (tokens, width) contiguous, with `residual` (the same shape) added where given.

    grad: gradient to the norm's output, (tokens, width), strided; it is overwritten by that output, computed anew.
    `with_fp8`: return the gradient to x in fp8 as well.
    """
    if not runs_kernels(x, "rmsnorm"):
        return rms_norm_backward_reference(grad, x, weight, rstd, plus_one, residual, with_fp8)
    rows, width = x.shape
    dx = torch.empty_like(x)
    fp8 = empty_fp8(rows, width, x.device) if with_fp8 else None
    block = next_power_of_2(width)
    _rms_norm_backward[(rows,)](
        grad,
        grad.stride(0),
        x,
        weight,
        rstd,
        x if residual is None else residual,
        dx,
        dx if fp8 is None else fp8.values,
        dx if fp8 is None else fp8.scales,
        width,
        plus_one,
        residual is not None,
        with_fp8,
        block,
        num_warps=num_warps_for(block),
    )
    return dx, fp8


def rms_norm_backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    plus_one: bool,
    residual: torch.Tensor | None,
    with_fp8: bool = False,
) -> tuple[torch.Tensor, RowwiseFp8 | None]:
    """As rms_norm_backward."""
    d_normed = grad.float() * (weight.float() + plus_one)
    normed = x.float() * rstd[:, None]
    dx = rstd[:, None] * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    if residual is not None:
        dx += residual.float()
    grad.copy_(_times_weight(normed, weight, plus_one, x.dtype))
    dx = dx.to(x.dtype)
    return dx, quantise_reference(dx) if with_fp8 else None


@jit
def _rms_norm(
    X: tl.tensor,
    W: tl.tensor,
    OUT: tl.tensor,
    out_stride: tl.tensor,
    RSTD: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    WITH_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    x = tl.load(X + row * K + column, mask=inside, other=0.0)
    x_fp32 = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_fp32 * x_fp32, 0) / K + eps)
    tl.store(RSTD + row, rstd)
    w = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    normed = x_fp32 * rstd
    if PLUS_ONE:
        y = normed * (1 + w)
    else:
        y = normed.to(x.dtype).to(tl.float32) * w
    tl.store(OUT + row * out_stride + column, y, mask=inside)
    if WITH_FP8:
        stored = tl.where(inside, y.to(x.dtype).to(tl.float32), 0.0)
        store_row_as_fp8(stored, VALUES, SCALES, row, column, K)


@jit
def _rms_norm_backward(
    GRAD: tl.tensor,
    grad_stride: tl.tensor,
    X: tl.tensor,
    W: tl.tensor,
    RSTD: tl.tensor,
    RESIDUAL: tl.tensor,
    DX: tl.tensor,
    VALUES: tl.tensor,
    SCALES: tl.tensor,
    K: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WITH_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    x = tl.load(X + row * K + column, mask=inside, other=0.0)
    w = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + row)
    normed = x.to(tl.float32) * rstd
    if PLUS_ONE:
        w += 1
        y = normed * w
    else:
        y = normed.to(x.dtype).to(tl.float32) * w
    d_normed = tl.load(GRAD + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32) * w
    dx = rstd * (d_normed - normed * (tl.sum(d_normed * normed, 0) / K))
    if HAS_RESIDUAL:
        dx += tl.load(RESIDUAL + row * K + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + row * K + column, dx, mask=inside)
    tl.store(GRAD + row * grad_stride + column, y, mask=inside)
    if WITH_FP8:
        stored = tl.where(inside, dx.to(x.dtype).to(tl.float32), 0.0)
        store_row_as_fp8(stored, VALUES, SCALES, row, column, K)
