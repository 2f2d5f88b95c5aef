"""Effective batch in examples, and how it may be split."""

from adder.training.batching import deal, divisors, packs_per_step

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


def test_packs_are_dealt_so_that_processes_have_about_as_many_tokens():
    tokens = [70, 100, 40, 90, 60, 80, 30]
    shares = deal([1, 0, 5, 3, 4, 2], tokens, processes=2, passes=2, micro_batch=2)
    assert sorted(pack for share in shares for passes in share for pack in passes) == [0, 1, 2, 3, 4, 5]
    assert [sum(tokens[pack] for passes in share for pack in passes) for share in shares] == [230, 210]
    assert [len(share) for share in shares] == [2, 2] and shares[0][0][0] == 1  # in the order in which they came


def test_one_process_has_the_packs_as_they_came():
    assert deal([4, 2, 9], [5] * 10, processes=1, passes=2, micro_batch=2) == [[[4, 2], [9]]]


def test_who_has_no_pack_left_has_an_empty_pass():
    assert deal([3], [5] * 4, processes=2, passes=1, micro_batch=2) == [[[3]], [[]]]
