"""Dequantisation of bitsandbytes' 4-bit weights into a matrix with strided rows, which leave room for LoRA's B.

A 4-bit weight (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) is a code of 16 values and, for each block of weights,
the largest absolute value, absmax: weight = code[index] · absmax of its block.
"""

from __future__ import annotations

from typing import Any

import torch

from adder.kernels.triton_utils import jit, next_power_of_2, runs_kernels, tl, triton


def dequantise_into(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """Write the values of a bitsandbytes 4-bit weight into `out`, (outputs, inputs), strided.

    packed: the weight's bytes, the first of two indices in the high half; `state`: its bitsandbytes QuantState. The
    values are those of bitsandbytes' dequantize_4bit, which can only write into a contiguous matrix.
    """
    if not runs_kernels(packed, "nf4"):
        return dequantise_into_reference(packed, state, out)
    from bitsandbytes.functional import dequantize_blockwise

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    rows, width = out.shape
    block = min(1024, next_power_of_2(width))
    _dequantise[(rows, triton.cdiv(width, block))](
        packed, state.code, absmax.float(), out, out.stride(0), width, state.blocksize, block, num_warps=4
    )


def dequantise_into_reference(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """As dequantise_into."""
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(packed, state))


@jit
def _dequantise(
    PACKED: tl.tensor,
    CODE: tl.tensor,
    ABSMAX: tl.tensor,
    OUT: tl.tensor,
    out_stride: tl.tensor,
    K: tl.tensor,
    BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    element = row * K + column
    byte = tl.load(PACKED + element // 2, mask=inside, other=0).to(tl.int32)
    index = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(CODE + index) * tl.load(ABSMAX + element // BLOCKSIZE, mask=inside, other=0.0)
    tl.store(OUT + row * out_stride + column, value, mask=inside)
