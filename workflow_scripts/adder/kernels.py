"""Memory-bound steps between a transformer's matrix products: Triton kernels, each beside its plain PyTorch reference.

Every public function runs its kernel on CUDA tensors and its reference (`*_reference`) elsewhere. All take matrices of
one row a token; arithmetic is fp32, results are stored in the tensors' own dtype (bf16 or fp16). Where a docstring
says "strided", rows may lie further apart than they are long, the numbers of one row being next to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

ACTIVATIONS = ("silu", "gelu_tanh")


def _jit(function):
    # A seed of 1, or one that 16 divides, must not make Triton compile the kernel again.
    return triton.jit(function, do_not_specialize=("seed", "threshold")) if triton is not None else function


def _width(number: int, least: int = 16) -> int:
    """The next power of two, at least `least`: what Triton's tiles and matrix instructions ask for."""
    return max(least, 1 << (number - 1).bit_length())


def _warps(width: int) -> int:
    return 4 if width <= 1024 else 8 if width <= 8192 else 16


# RMSNorm -------------------------------------------------------------------------------------------------------------


def rms_norm_into(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool, out: torch.Tensor) -> torch.Tensor:
    """Write RMSNorm(x) into `out`, (tokens, width), strided; return 1 / rms of each row, fp32 (tokens,).

    x: (tokens, width), contiguous. `plus_one`: Gemma's norm, which multiplies by 1 + weight and rounds once; Llama's
    rounds the normalised value before it multiplies by weight.
    """
    if not x.is_cuda:
        return rms_norm_into_reference(x, weight, eps, plus_one, out)
    rows, width = x.shape
    inverse = torch.empty(rows, device=x.device, dtype=torch.float32)
    block = _width(width)
    _rms_norm[(rows,)](x, weight, out, out.stride(0), inverse, eps, width, plus_one, block, num_warps=_warps(block))
    return inverse


def rms_norm_into_reference(x, weight, eps, plus_one, out):
    """As rms_norm_into."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    out.copy_(_scaled(wide * inverse[:, None], weight, plus_one, x.dtype))
    return inverse


def _scaled(normed: torch.Tensor, weight: torch.Tensor, plus_one: bool, dtype: torch.dtype) -> torch.Tensor:
    return normed * (1 + weight.float()) if plus_one else normed.to(dtype).float() * weight.float()


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    plus_one: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the gradient to x, (tokens, width) contiguous, with `residual` (the same shape) added where given.

    grad: gradient to the norm's output, (tokens, width), strided; it is overwritten by that output, computed anew.
    """
    if not x.is_cuda:
        return rms_norm_backward_reference(grad, x, weight, inverse, plus_one, residual)
    rows, width = x.shape
    result = torch.empty_like(x)
    block = _width(width)
    _rms_norm_backward[(rows,)](
        grad,
        grad.stride(0),
        x,
        weight,
        inverse,
        x if residual is None else residual,
        result,
        width,
        plus_one,
        residual is not None,
        block,
        num_warps=_warps(block),
    )
    return result


def rms_norm_backward_reference(grad, x, weight, inverse, plus_one, residual):
    """As rms_norm_backward."""
    scaled = grad.float() * (weight.float() + plus_one)
    normed = x.float() * inverse[:, None]
    result = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if residual is not None:
        result += residual.float()
    grad.copy_(_scaled(normed, weight, plus_one, x.dtype))
    return result.to(x.dtype)


@_jit
def _rms_norm(X, W, OUT, out_stride, INVERSE, eps, K: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr):
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


@_jit
def _rms_norm_backward(
    GRAD,
    grad_stride,
    X,
    W,
    INVERSE,
    RESIDUAL,
    RESULT,
    K: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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


# Dropout -------------------------------------------------------------------------------------------------------------
# The mask is a hash of seed, row and column, so that forward and backward make the same one and none is stored.


def dropout_mask(seed: int, rows: int, width: int, p: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask of the functions below, bool (rows, width): True is kept. A number is dropped with probability p."""
    row = _mix(torch.arange(rows, device=device) ^ seed)
    return _mix((row[:, None] + torch.arange(width, device=device)) & 0xFFFFFFFF) >= _threshold(p)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Chris Wellons' lowbias32, a hash of 32-bit numbers (https://nullprogram.com/blog/2018/07/31/)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _threshold(p: float) -> int:
    return min(int(p * 2**32), 2**32 - 1)


@_jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@_jit
def _kept(row, column, seed, threshold):
    mixed = _mixed(row.to(tl.uint32) ^ seed.to(tl.uint32))
    return _mixed(mixed + column.to(tl.uint32)) >= threshold.to(tl.uint32)


# Gated activation ----------------------------------------------------------------------------------------------------


def gated_into(gate_up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """Write activation(gate) · up into `out`, (tokens, width), strided. gate_up: (tokens, 2 · width), contiguous."""
    if not gate_up.is_cuda:
        return gated_into_reference(gate_up, activation, out)
    rows, width = out.shape
    block = min(2048, _width(width))
    grid = (rows, triton.cdiv(width, block))
    _gated[grid](gate_up, out, out.stride(0), width, activation == "silu", block, num_warps=_warps(block))


def gated_into_reference(gate_up, activation, out):
    """As gated_into."""
    gate, up = gate_up.float().chunk(2, -1)
    out.copy_(activate(gate, activation) * up)


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
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
    if not gate_up.is_cuda:
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
        _threshold(p),
        1 / (1 - p),
        activation == "silu",
        dropout is not None,
        *(_width(rank) if rank else 0 for rank in ranks),
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


@_jit
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


@_jit
def _gated(GATE_UP, OUT, out_stride, F, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(GATE_UP + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _gate(gate, SILU)
    tl.store(OUT + row * out_stride + column, value * up, mask=inside)


@_jit
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
                kept = _kept(row, column, seed, threshold)
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


# Rotary position embedding -------------------------------------------------------------------------------------------


def rotate(
    source: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, inverse: bool = False
) -> None:
    """Turn each head by its position's angles into `out`; back by them with `inverse`. `out` may be `source`.

    source, out: (tokens, heads, head size), the numbers of one head next to each other. cos, sin: (period, head size),
    contiguous, both halves of a row alike (transformers' rotary embedding); token t takes row t modulo period.
    """
    if not source.is_cuda:
        return rotate_reference(source, cos, sin, out, inverse)
    rows, heads, size = source.shape
    grid = (rows,)
    _rotate[grid](
        source,
        source.stride(0),
        source.stride(1),
        out,
        out.stride(0),
        out.stride(1),
        cos,
        sin,
        cos.shape[0],
        heads,
        size // 2,
        inverse,
        _width(heads, 1),
        _width(size // 2, 1),
        num_warps=4 if heads * size > 1024 else 2,
    )


def rotate_reference(source, cos, sin, out, inverse=False):
    """As rotate."""
    repeat = source.shape[0] // cos.shape[0]
    c, s = (table.float().repeat(repeat, 1).chunk(2, -1)[0][:, None] for table in (cos, sin))
    s = -s if inverse else s
    a, b = source.float().chunk(2, -1)
    out.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))


@_jit
def _rotate(
    SOURCE,
    source_row,
    source_head,
    OUT,
    out_row,
    out_head,
    COS,
    SIN,
    period,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BH)[:, None]
    column = tl.arange(0, BN)[None, :]
    inside = (head < HEADS) & (column < HALF)
    table = (row % period) * 2 * HALF + column
    c = tl.load(COS + table, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(SIN + table, mask=column < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    source_at = SOURCE + row * source_row + head * source_head + column
    out_at = OUT + row * out_row + head * out_head + column
    a = tl.load(source_at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source_at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, a * c - b * s, mask=inside)
    tl.store(out_at + HALF, b * c + a * s, mask=inside)


# Thin products with dropout ------------------------------------------------------------------------------------------


def dropped_product(x: torch.Tensor, a: torch.Tensor, seed: int, p: float, out: torch.Tensor) -> None:
    """Write dropout(x) · aᵀ into `out`. x: (tokens, width) and out: (tokens, rank), strided; a: (rank, width)."""
    if not x.is_cuda:
        return dropped_product_reference(x, a, seed, p, out)
    (rows, width), rank = x.shape, a.shape[0]
    _dropped_product[(triton.cdiv(rows, 64),)](
        x, x.stride(0), a, out, out.stride(0), rows, width, rank, seed, _threshold(p), 1 / (1 - p), _width(rank), 64, 64
    )


def dropped_product_reference(x, a, seed, p, out):
    """As dropped_product."""
    mask = dropout_mask(seed, *x.shape, p, x.device)
    out.copy_((x.float() * mask) @ a.float().t() / (1 - p))


def dropped_weight_grad(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """Return gradᵀ · dropout(x), fp32 (rank, width). grad: (tokens, rank) and x: (tokens, width), both strided."""
    if not x.is_cuda:
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
        _threshold(p),
        1 / (1 - p),
        _width(rank),
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
    if not total.is_cuda:
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
        _threshold(p),
        1 / (1 - p),
        _width(rank),
        64,
        128,
    )


def add_dropped_input_grad_reference(total, grad, a, seed, p):
    """As add_dropped_input_grad."""
    mask = dropout_mask(seed, *total.shape, p, total.device)
    total.copy_(total.float() + mask * (grad.float() @ a.float()) / (1 - p))


@_jit
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
        x = tl.where(_kept(row, column, seed, threshold), x, 0.0)
        down = start + tl.arange(0, BK)[:, None]
        a = tl.load(A + rank[None, :] * K + down, mask=(rank[None, :] < RANK) & (down < K), other=0.0)
        total = tl.dot(x.to(a.dtype), a, total)
    at = OUT + long_row * out_stride + rank[None, :]
    tl.store(at, total * scale, mask=(row < rows) & (rank[None, :] < RANK))


@_jit
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
        x = tl.where(_kept(row, column, seed, threshold), x, 0.0)
        grad = tl.load(GRAD + across.to(tl.int64) * grad_stride + rank, mask=(across < rows) & (rank < RANK), other=0.0)
        total = tl.dot(grad, x.to(grad.dtype), total)
    at = PARTS + (share * RANK + rank) * K + column
    tl.store(at, total * scale, mask=(rank < RANK) & (column < K))


@_jit
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
    tl.store(at, total + tl.where(_kept(row, column, seed, threshold), added, 0.0), mask=inside)


# NF4 -----------------------------------------------------------------------------------------------------------------


def dequantise_into(packed: torch.Tensor, state, out: torch.Tensor) -> None:
    """Write the values of a bitsandbytes 4-bit weight into `out`, (outputs, inputs), strided.

    packed: the weight's bytes, the first of two numbers in the high half; `state`: its QuantState. The values are those
    of bitsandbytes' dequantize_4bit, which can only write into a matrix without gaps.
    """
    if not packed.is_cuda:
        return dequantise_into_reference(packed, state, out)
    from bitsandbytes.functional import dequantize_blockwise

    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(state.absmax, state.state2) + state.offset
    rows, width = out.shape
    block = min(1024, _width(width))
    _dequantise[(rows, triton.cdiv(width, block))](
        packed, state.code, largest.float(), out, out.stride(0), width, state.blocksize, block, num_warps=4
    )


def dequantise_into_reference(packed, state, out):
    """As dequantise_into."""
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(packed, state))


@_jit
def _dequantise(PACKED, CODE, LARGEST, OUT, out_stride, K, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    number = row * K + column
    byte = tl.load(PACKED + number // 2, mask=inside, other=0).to(tl.int32)
    index = tl.where(number % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(CODE + index) * tl.load(LARGEST + number // BLOCKSIZE, mask=inside, other=0.0)
    tl.store(OUT + row * out_stride + column, value, mask=inside)
