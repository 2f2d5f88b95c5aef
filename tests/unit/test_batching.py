"""Effective batch in examples, and what is tried when memory is short."""

import pytest

from adder.batching import choose_batch, divisors, packs_per_step
from adder.errors import UserError

PACKS = [[100, 100, 100]] * 40  # three examples each


def settings(**changes) -> dict:
    return {
        "effective_batch_size": 16,
        "micro_batch_size": "auto",
        "gradient_checkpointing": "auto",
        "method": "qlora",
        **changes,
    }


def values(choices: dict) -> tuple:
    names = ("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    return tuple(choices[name].value for name in names)


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


def test_on_a_gpu_the_largest_micro_batch_that_fits_is_taken():
    asked = []

    def fits(micro, checkpointing):
        asked.append((micro, checkpointing))
        return micro <= 2

    assert values(choose_batch(settings(effective_batch_size=12), PACKS, "cuda", fits)) == (2, 2, False)
    assert asked == [(4, False), (2, False)]


def test_checkpointing_only_where_nothing_fits_without():
    choices = choose_batch(settings(), PACKS, "cuda", lambda micro, checkpointing: checkpointing)
    assert values(choices) == (5, 1, True)


def test_nothing_fits_is_one_clear_error():
    with pytest.raises(UserError, match="not even 1 pack of 300 tokens fits .* lower lengths.max_seq_length"):
        choose_batch(settings(), PACKS, "cuda", lambda micro, checkpointing: False)


def test_set_values_are_kept():
    choices = choose_batch(settings(micro_batch_size=2, gradient_checkpointing=True), PACKS, "cuda", lambda *_: True)
    assert values(choices) == (2, 2, True)


def test_on_a_cpu_nothing_is_probed():
    def never(*_):
        raise AssertionError

    assert values(choose_batch(settings(effective_batch_size=18), PACKS, "cpu", never)) == (3, 2, False)
