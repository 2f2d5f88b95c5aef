"""Effective batch in examples, and how it may be split."""

from adder.batching import divisors, packs_per_step

PACKS = [[100, 100, 100]] * 40  # three examples each


def test_effective_batch_counts_examples_not_packs():
    packs, sentence = packs_per_step(16, PACKS)
    assert packs == 5
    assert (
        "16 examples a step were asked for and a pack holds 3.0 on average: 5 packs with 15.0 examples a step"
        in sentence
    )
    assert packs_per_step(1, PACKS)[0] == 1
    assert packs_per_step(10_000, PACKS)[0] == len(PACKS)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
