"""Rounding to 16 bits that keeps the mean: to one of the two neighbours, at random in proportion to the distance.

A base's weights are exact in 16 bits, and much of what an adapter adds is less than half a step: rounding to nearest
would drop all of that, in every weight. Measured on a briefly trained adapter of a bf16 model of 135 M parameters:
0.0055 nats a token from base + adapter and a held-out loss of 1.11 for 1.04, against 0.0001 nats and the same loss this
way. Source: Gupta et al. 2015, arXiv:1502.02551.
"""

import hashlib

import numpy as np
import torch


def round_without_bias(exact: torch.Tensor, dtype: torch.dtype, seed: str, block: int = 0) -> torch.Tensor:
    """Round finite fp32 values to `dtype` (bf16, fp16 or fp32): up or down at random so that the mean is kept.

    What `dtype` can hold stays exact. The random numbers follow from `seed` and `block` alone, whatever the threads,
    the order of the blocks and the device of `exact`.
    """
    if dtype == torch.float32:
        return exact
    if dtype == torch.bfloat16:
        return _to_bfloat16(exact, seed, block)
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    chance = error / (other.float() - nearest.float())
    uniform = _random(exact, seed, block, np.int32).double() / 2**32 + 0.5
    return torch.where(uniform < chance, other, nearest)


def _to_bfloat16(exact: torch.Tensor, seed: str, block: int) -> torch.Tensor:
    # bf16 is the upper half of fp32, and between two neighbours of bf16 fp32's bits count up evenly: with a random
    # number from 0 to 65,535 added to them, the carry into the upper half comes just as often as it should.
    bits = torch.add(exact.view(torch.int32), _random(exact, seed, block, np.int16))
    return bits.add_(0x8000).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _random(like: torch.Tensor, seed: str, block: int, kind: type[np.int16] | type[np.int32]) -> torch.Tensor:
    """Random integers over all of `kind`, shaped as `like` and on its device."""
    entropy = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=16).digest())
    generator = np.random.SFC64(np.random.SeedSequence(entropy, spawn_key=(block,)))
    count = like.numel()
    raw = generator.random_raw(-(-count * np.dtype(kind).itemsize // 8))
    return torch.from_numpy(raw.view(kind)[:count]).view(like.shape).to(like.device)
