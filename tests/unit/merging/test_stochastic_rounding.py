"""Rounding to 16 bits keeps the mean, never leaves the two neighbours, and leaves exact values alone."""

import numpy as np
import pytest
import torch

from adder.merging.stochastic_rounding import round_without_bias

HALVES = (torch.bfloat16, torch.float16)


def neighbours(exact, dtype):
    """The largest number of `dtype` that isn't above `exact`, and the smallest that isn't below."""
    nearest = exact.to(dtype)
    infinity = torch.full_like(nearest, torch.inf)
    below = torch.where(nearest.float() > exact, torch.nextafter(nearest, -infinity), nearest)
    above = torch.where(nearest.float() < exact, torch.nextafter(nearest, infinity), nearest)
    return below, above


def awkward_numbers(dtype):
    """fp32 numbers of all sizes that `dtype` spans: normal, subnormal, zero, around powers of two, near the largest."""
    generator = torch.Generator().manual_seed(0)
    smallest = torch.finfo(dtype).smallest_normal
    largest = torch.finfo(dtype).max
    exponents = torch.linspace(np.log2(smallest) - 12, np.log2(largest) - 0.01, 20_000, dtype=torch.float64)
    numbers = (2.0**exponents * (1 + torch.rand(20_000, generator=generator))).clamp(max=largest).float()
    powers = (2.0 ** torch.arange(-14.0, 15.0))[:, None] * (1 + torch.tensor([-1e-7, -1e-3, 0.0, 1e-7, 1e-3]))
    numbers = torch.cat([numbers, powers.flatten(), torch.tensor([0.0, largest])])
    return torch.cat([numbers, -numbers])


@pytest.mark.parametrize("dtype", HALVES)
def test_always_one_of_the_two_neighbours(dtype):
    exact = awkward_numbers(dtype)
    below, above = neighbours(exact, dtype)
    taken = set()
    for block in range(20):
        found = round_without_bias(exact, dtype, "w", block)
        is_below, is_above = found == below, found == above
        assert bool((is_below | is_above).all())
        taken |= {"below"} if bool((is_below & ~is_above).any()) else set()
        taken |= {"above"} if bool((is_above & ~is_below).any()) else set()
    assert taken == {"below", "above"}


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_of_many_roundings_is_the_number(dtype):
    """Each of 60 numbers is rounded a million times: the share that goes up is its distance from below.

    A share of n draws has a standard deviation of sqrt(p (1 - p) / n), 0.0005 at most; 5 of them are exceeded once in
    30,000 runs of 60 numbers, and the seeds are fixed.
    """
    draws = 2**20
    step = float(torch.finfo(dtype).eps)
    smallest = torch.finfo(dtype).smallest_normal
    for scale in (1.0, -0.37, 3 * smallest, 0.3 * smallest):
        for part in (1 / 512, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.999):
            exact = torch.tensor([scale]).to(dtype).float()
            low, high = neighbours(exact * (1 + 0.4 * step), dtype)
            low, high = (high, low) if scale < 0 else (low, high)  # away from zero
            number = (low.double() + part * (high.double() - low.double())).float()
            found = round_without_bias(number.expand(draws).contiguous(), dtype, f"{scale} {part}")
            wanted = float((number.double() - low.double()) / (high.double() - low.double()))
            share = float((found == high).double().mean())
            assert abs(share - wanted) < 5 * max((wanted * (1 - wanted) / draws) ** 0.5, 1e-6), (scale, part)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_change_below_the_weights_rounding_is_kept_on_average(dtype):
    # Rounded to nearest, a change of a tenth of a step would leave every weight as it was and undo the training.
    weight = torch.linspace(1.0, 1.9, 64).repeat(256, 1).to(dtype)
    step = torch.finfo(dtype).eps
    change = (round_without_bias(weight.float() + 0.1 * step, dtype, "w").float() - weight.float()) / step
    assert set(change.unique().tolist()) == {0.0, 1.0}
    assert float(change.mean()) == pytest.approx(0.1, abs=0.01)  # standard deviation of the mean: 0.0023
    negative = round_without_bias(-weight.float() - 0.1 * step, dtype, "w").float() + weight.float()
    assert float(negative.mean()) == pytest.approx(-0.1 * step, abs=0.01 * step)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_what_the_dtype_holds_stays_exact_to_the_bit(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    exact = exact[torch.isfinite(exact)]
    found = round_without_bias(exact.float(), dtype, "w")
    assert torch.equal(found.view(torch.uint8), exact.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_seed_and_the_block_alone_decide(dtype):
    exact = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    first = round_without_bias(exact, dtype, "w", 3)
    torch.manual_seed(5), np.random.seed(5)
    assert torch.equal(first, round_without_bias(exact, dtype, "w", 3))
    assert not torch.equal(first, round_without_bias(exact, dtype, "w", 4))
    assert not torch.equal(first, round_without_bias(exact, dtype, "v", 3))


def test_neighbouring_numbers_are_rounded_independently():
    """One half, all over: ups and downs of neighbours agree half of the time (0.5 +- 5 standard deviations)."""
    exact = torch.full((2**20,), 1 + 2.0**-8)
    up = round_without_bias(exact, torch.bfloat16, "w") > 1
    for distance in (1, 2, 4, 512):
        agree = float((up[distance:] == up[:-distance]).double().mean())
        assert abs(agree - 0.5) < 0.0025


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_a_gpu_rounds_as_the_cpu_does(dtype):
    exact = awkward_numbers(dtype)
    found = round_without_bias(exact.cuda(), dtype, "w", 7)
    assert torch.equal(found.cpu(), round_without_bias(exact, dtype, "w", 7))
