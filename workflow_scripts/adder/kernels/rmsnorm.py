"""RMSNorm forward and backward as Triton kernels.

Arithmetic is fp32, results are stored in the tensors' own dtype (bf16 or fp16). "Strided": rows may lie further apart
than they are long, the numbers of one row being next to each other.
"""

from __future__ import annotations

import torch

from adder.kernels.fp8 import Fp8Rows, empty_rows, fp8_scale, quantise_reference
from adder.kernels.triton_utils import jit, runs_kernels, tl, warps_for, width_of


def rms_norm_into(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool, out: torch.Tensor, quantised: bool = False
) -> tuple[torch.Tensor, Fp8Rows | None]:
    """Write RMSNorm(x) into `out`, (tokens, width), strided; return 1 / rms of each row, fp32 (tokens,).

    x: (tokens, width), contiguous. `plus_one`: Gemma's norm, which multiplies by 1 + weight and rounds once; Llama's
    rounds the normalised value before it multiplies by weight. `quantised`: return what was written in fp8 as well.
    """
    if not runs_kernels(x):
        return rms_norm_into_reference(x, weight, eps, plus_one, out, quantised)
    rows, width = x.shape
    inverse = torch.empty(rows, device=x.device, dtype=torch.float32)
    block = width_of(width)
    in_fp8 = empty_rows(rows, width, x.device) if quantised else None
    _rms_norm[(rows,)](
        x,
        weight,
        out,
        out.stride(0),
        inverse,
        in_fp8.values if quantised else out,
        in_fp8.scales if quantised else out,
        eps,
        width,
        plus_one,
        quantised,
        block,
        num_warps=warps_for(block),
    )
    return inverse, in_fp8


def rms_norm_into_reference(x, weight, eps, plus_one, out, quantised=False):
    """As rms_norm_into."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    out.copy_(_scaled(wide * inverse[:, None], weight, plus_one, x.dtype))
    return inverse, quantise_reference(out) if quantised else None


def _scaled(normed: torch.Tensor, weight: torch.Tensor, plus_one: bool, dtype: torch.dtype) -> torch.Tensor:
    return normed * (1 + weight.float()) if plus_one else normed.to(dtype).float() * weight.float()


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    plus_one: bool,
    residual: torch.Tensor | None,
    quantised: bool = False,
) -> tuple[torch.Tensor, Fp8Rows | None]:
    """Return the gradient to x, (tokens, width) contiguous, with `residual` (the same shape) added where given.

    grad: gradient to the norm's output, (tokens, width), strided; it is overwritten by that output, computed anew.
    `quantised`: return the gradient to x in fp8 as well.
    """
    if not runs_kernels(x):
        return rms_norm_backward_reference(grad, x, weight, inverse, plus_one, residual, quantised)
    rows, width = x.shape
    result = torch.empty_like(x)
    in_fp8 = empty_rows(rows, width, x.device) if quantised else None
    block = width_of(width)
    _rms_norm_backward[(rows,)](
        grad,
        grad.stride(0),
        x,
        weight,
        inverse,
        x if residual is None else residual,
        result,
        in_fp8.values if quantised else result,
        in_fp8.scales if quantised else result,
        width,
        plus_one,
        residual is not None,
        quantised,
        block,
        num_warps=warps_for(block),
    )
    return result, in_fp8


def rms_norm_backward_reference(grad, x, weight, inverse, plus_one, residual, quantised=False):
    """As rms_norm_backward."""
    scaled = grad.float() * (weight.float() + plus_one)
    normed = x.float() * inverse[:, None]
    result = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if residual is not None:
        result += residual.float()
    grad.copy_(_scaled(normed, weight, plus_one, x.dtype))
    result = result.to(x.dtype)
    return result, quantise_reference(result) if quantised else None


@jit
def _rms_norm(
    X,
    W,
    OUT,
    out_stride,
    INVERSE,
    VALUES,
    SCALES,
    eps,
    K: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    x = tl.load(X + row * K + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    tl.store(INVERSE + row, inverse)
    w = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    normed = wide * inverse
    if PLUS_ONE:
        y = normed * (1 + w)
    else:
        y = normed.to(x.dtype).to(tl.float32) * w
    tl.store(OUT + row * out_stride + column, y, mask=inside)
    if QUANTISED:
        _store_in_fp8(y.to(x.dtype), VALUES, SCALES, row, column, K)


@jit
def _store_in_fp8(y, VALUES, SCALES, row, column, K: tl.constexpr):
    """Store a row, rounded as it is stored elsewhere."""
    y = tl.where(column < K, y.to(tl.float32), 0.0)
    scale = fp8_scale(tl.max(tl.abs(y), 0))
    tl.store(SCALES + row, scale)
    tl.store(VALUES + row * K + column, (y / scale).to(tl.float8e4nv), mask=column < K)


@jit
def _rms_norm_backward(
    GRAD,
    grad_stride,
    X,
    W,
    INVERSE,
    RESIDUAL,
    RESULT,
    VALUES,
    SCALES,
    K: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    x = tl.load(X + row * K + column, mask=inside, other=0.0)
    w = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(INVERSE + row)
    normed = x.to(tl.float32) * inverse
    if PLUS_ONE:
        w += 1
        y = normed * w
    else:
        y = normed.to(x.dtype).to(tl.float32) * w
    scaled = tl.load(GRAD + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32) * w
    result = inverse * (scaled - normed * (tl.sum(scaled * normed, 0) / K))
    if HAS_RESIDUAL:
        result += tl.load(RESIDUAL + row * K + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(RESULT + row * K + column, result, mask=inside)
    tl.store(GRAD + row * grad_stride + column, y, mask=inside)
    if QUANTISED:
        _store_in_fp8(result.to(x.dtype), VALUES, SCALES, row, column, K)
