"""The values of bitsandbytes' 4-bit weights, written into a matrix whose rows have room behind them."""

from __future__ import annotations

import torch

from adder.kernels.triton_utils import jit, runs_kernels, tl, triton, width_of


def dequantise_into(packed: torch.Tensor, state, out: torch.Tensor) -> None:
    """Write the values of a bitsandbytes 4-bit weight into `out`, (outputs, inputs), strided.

    packed: the weight's bytes, the first of two numbers in the high half; `state`: its QuantState. The values are those
    of bitsandbytes' dequantize_4bit, which can only write into a matrix without gaps.
    """
    if not runs_kernels(packed):
        return dequantise_into_reference(packed, state, out)
    from bitsandbytes.functional import dequantize_blockwise

    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(state.absmax, state.state2) + state.offset
    rows, width = out.shape
    block = min(1024, width_of(width))
    _dequantise[(rows, triton.cdiv(width, block))](
        packed, state.code, largest.float(), out, out.stride(0), width, state.blocksize, block, num_warps=4
    )


def dequantise_into_reference(packed, state, out):
    """As dequantise_into."""
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(packed, state))


@jit
def _dequantise(PACKED, CODE, LARGEST, OUT, out_stride, K, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    number = row * K + column
    byte = tl.load(PACKED + number // 2, mask=inside, other=0).to(tl.int32)
    index = tl.where(number % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(CODE + index) * tl.load(LARGEST + number // BLOCKSIZE, mask=inside, other=0.0)
    tl.store(OUT + row * out_stride + column, value, mask=inside)
