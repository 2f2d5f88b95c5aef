"""Duplicates, leaks and near-duplicates as arrays."""

import numpy as np

from adder.formatting.block_converter import HELDOUT, TEST, TRAIN
from adder.formatting.similarity.deduplication import find_duplicates, find_leaks, find_near_duplicates
from adder.formatting.similarity.minhash import Signer
from format_stage import SENTENCE, numbered


def sides(*values: int):
    return np.array(values, np.int8)


def hashes(*values: int):
    return np.array(values, np.uint64)


def pairs(found):
    return list(zip(found.rows.tolist(), found.matches.tolist(), strict=True))


def test_a_duplicate_names_the_first_row_of_its_side():
    side = sides(TRAIN, HELDOUT, TRAIN, HELDOUT, TRAIN, TEST, TEST)
    assert pairs(find_duplicates(side, hashes(5, 5, 5, 5, 5, 5, 5))) == [(2, 0), (3, 1), (4, 0)]
    assert pairs(find_duplicates(side, hashes(1, 2, 3, 4, 5, 6, 6))) == []
    assert pairs(find_duplicates(sides(), hashes())) == []


def test_a_leak_names_the_first_held_out_or_test_row_that_asks_the_same():
    side = sides(TRAIN, TEST, HELDOUT, TRAIN, HELDOUT, TRAIN)
    assert pairs(find_leaks(side, hashes(8, 9, 8, 9, 8, 7))) == [(0, 2), (3, 1)]
    assert pairs(find_leaks(sides(TRAIN, TRAIN), hashes(1, 1))) == []


def test_near_duplicates_go_by_the_numbers_of_all_rows():
    texts = [numbered(0, 40), SENTENCE * 3, numbered(500, 40), SENTENCE * 3 + " end", SENTENCE * 3]
    found = find_near_duplicates(Signer().sign(texts), np.array([0, 1, 2, 4]), 0.8)
    assert pairs(found) == [(4, 1)] and found.shares.tolist() == [1.0]
