"""What Triton kernels share: Triton where it is installed, block sizes, and whether kernels do a tensor's work.

Each kernel stands beside its plain PyTorch reference (`*_reference`), which runs on tensors that are not on a CUDA
device. With TRITON_INTERPRET=1 in the environment Triton's interpreter runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """What a program of a kernel takes at a time, and with how many warps and stages of prefetching."""

    rows: int
    columns: int
    warps: int
    stages: int


def jit(function):
    """triton.jit, where there is Triton; a seed of 1, or one that 16 divides, does not make it compile anew."""
    return triton.jit(function, do_not_specialize=("seed", "threshold")) if triton is not None else function


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether work on this tensor is done by kernels, and not by their references."""
    return tensor.is_cuda or INTERPRETED


def width_of(number: int, least: int = 16) -> int:
    """The next power of two, at least `least`: what Triton's tiles and matrix instructions ask for."""
    return max(least, 1 << (number - 1).bit_length())


def warps_for(width: int) -> int:
    """Warps of a program that holds a row of so many numbers."""
    return 4 if width <= 1024 else 8 if width <= 8192 else 16
