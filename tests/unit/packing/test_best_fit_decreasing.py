import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.packing.best_fit_decreasing import batch_padded_positions, best_fit_decreasing, one_by_one, waste

ARTICLE = [180, 95, 310, 150, 220, 60, 400, 130, 275, 200]


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each pack, by the textbook: look at every open pack for every example."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda pack: rooms[pack])] -= length
        else:
            rooms.append(capacity - length)
    return rooms


def as_lists(packs) -> list[list[int]]:
    return [packs[number].tolist() for number in range(len(packs))]


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 200))
    return draw(st.lists(st.integers(1, capacity), max_size=120)), capacity


@given(problems())
def test_every_example_once_no_pack_too_full_and_as_many_packs_as_the_textbook(problem):
    lengths, capacity = problem
    packs = as_lists(best_fit_decreasing(lengths, capacity))
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[index] for index in pack) for pack in packs]
    assert all(room >= 0 for room in rooms)
    assert sorted(rooms) == sorted(naive_best_fit_decreasing(lengths, capacity))


@given(problems())
def test_the_same_lengths_give_the_same_packs_as_list_and_as_array(problem):
    lengths, capacity = problem
    from_list = best_fit_decreasing(lengths, capacity)
    from_array = best_fit_decreasing(np.array(lengths, dtype=np.int32), capacity)
    assert as_lists(from_list) == as_lists(from_array)


@given(problems(), st.randoms(use_true_random=False))
def test_packs_in_another_order_are_the_same_packs(problem, random):
    packs = best_fit_decreasing(*problem)
    order = list(range(len(packs)))
    random.shuffle(order)
    assert as_lists(packs.take(np.array(order, dtype=np.int64))) == [as_lists(packs)[pack] for pack in order]


def test_ten_lengths_of_the_article_at_2048_tokens():
    packs = best_fit_decreasing(ARTICLE, 2048)
    assert len(packs) == 1
    tokens = sum(ARTICLE)
    padded, packed = len(ARTICLE) * 2048, len(packs) * 2048
    assert (tokens, padded, packed) == (2020, 20480, 2048)
    assert round(100 * waste(tokens, padded), 1) == 90.1
    assert round(100 * waste(tokens, packed), 1) == 1.4
    assert padded / packed == 10


def test_a_length_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="1..64, found 3..65"):
        best_fit_decreasing([3, 65], 64)
    with pytest.raises(ValueError, match="found 0"):
        best_fit_decreasing([0, 5], 64)


def test_nothing_to_pack():
    assert as_lists(best_fit_decreasing([], 64)) == []
    assert as_lists(one_by_one(3)) == [[0], [1], [2]]
    assert batch_padded_positions([], 8) == 0
    assert waste(0, 0) == 0


def test_batches_are_padded_to_their_longest_example():
    assert batch_padded_positions([5, 5, 5, 5, 5], batch_size=2) == 25
    assert batch_padded_positions([1, 2, 9], batch_size=16) == 27
    assert batch_padded_positions([1, 2, 9], batch_size=1) == 12
    lengths = np.arange(1, 1001)
    assert batch_padded_positions(lengths, 16, seed=1) == batch_padded_positions(lengths, 16, seed=1)
    assert lengths.sum() < batch_padded_positions(lengths, 16) < len(lengths) * 1000


def test_a_million_chat_like_examples_in_packs_that_are_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.6, 1_000_000).astype(int), 4, 2048)
    start = time.perf_counter()
    packs = best_fit_decreasing(lengths, 2048)
    assert time.perf_counter() - start < 20  # measured 0.2 s; a quadratic packer needs hours
    assert waste(int(lengths.sum()), len(packs) * 2048) < 0.01
