"""What Triton kernels share: Triton where it is installed, block sizes, and whether kernels do a tensor's work.

Each kernel stands beside its plain PyTorch reference (`*_reference`), which runs on tensors that are not on a CUDA
device, and where a trial has switched the kernel off (`families`). With TRITON_INTERPRET=1 in the environment Triton's
interpreter runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from adder.kernels import tiles
from adder.kernels.families import Family, why_off

if TYPE_CHECKING:
    # Triton is untyped, and not installed where torch has no CUDA: type checkers see the same on every machine.
    class _Untyped(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Untyped):
        """triton.language."""

        constexpr: TypeAlias = Any
        tensor: TypeAlias = Any  # a block of values or pointers, or one of either

    triton: Any = None
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # torch without CUDA comes without it
        triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

# Families whose kernels have matmuls.
WITH_MATMULS = {"adder_triton", "swiglu_backward", "dropout", "fp8", "decode_attention"}


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit, where there is Triton; a seed of 1, or one that 16 divides, does not make it compile anew."""
    return triton.jit(function, do_not_specialize=("seed", "threshold")) if triton is not None else function


def runs_kernels(tensor: torch.Tensor, family: Family) -> bool:
    """Whether work on this tensor is done by a family's kernels, and not by their references.

    On a GPU it is where Triton is installed (torch's wheels for Windows and Jetson come without), compiles for this
    card, with tensor cores where the family needs them, and no trial has switched the family off.
    """
    if why_off(family) is not None:
        return False
    if INTERPRETED or not tensor.is_cuda or triton is None:
        return INTERPRETED
    card = tiles.card_of(tensor.device)
    return tiles.multiplies(card) if family in WITH_MATMULS else tiles.compiles(card)


def next_power_of_2(n: int, minimum: int = 16) -> int:
    """The next power of two, at least `minimum`: what Triton's blocks and matrix instructions ask for."""
    return max(minimum, 1 << (n - 1).bit_length())


def num_warps_for(row_width: int) -> int:
    """Warps of a program that holds a row of so many values."""
    return 4 if row_width <= 1024 else 8 if row_width <= 8192 else 16


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b in fp32, from 16-bit matrices on a GPU without rounding the sums."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
