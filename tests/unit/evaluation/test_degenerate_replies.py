"""Replies that are none are counted, and others aren't."""

import pytest

from adder.evaluation.degenerate_replies import circles, find_faults, in_words


@pytest.mark.parametrize(
    "text",
    [
        "........",
        "ha ha ha ha ha ha",
        "I see. " + "The cat sat. " * 6,
        "word " * 9 + "wo",
        "so it goes and goes on " * 30,
    ],
)
def test_what_runs_in_circles(text):
    assert circles(text.strip())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "no no",
        "0000",
        "1, 2, 3, 4, 5, 6, 7, 8",
        '{"name": "A", "value": 1, "unit": null, "count": null}',
        "Add the flour, then add the milk, then add the eggs, and stir until it is smooth.",
        "Dear customer, thank you very much for your letter. "
        + " ".join(f"item {n} costs {n} euros;" for n in range(30)),
    ],
)
def test_what_does_not(text):
    assert not circles(text)


def test_each_fault_is_counted_and_named():
    references = [f"reference {n}" for n in range(20)]
    dots = find_faults(["........"] * 20, references, [False] * 20)
    assert dots == (20, 20, 0, 20, 20, 20) and dots.share == 1
    assert len(in_words(dots)) == 3 and "20 of 20 replies were cut off" in in_words(dots)[0]
    empty = find_faults([""] * 3 + references[3:], references, [True] * 20)
    assert (empty.empty, empty.alike, empty.faulty) == (3, 0, 3) and in_words(empty, 0.2) == []
    good = find_faults(references, references, [True] * 20)
    assert good.faulty == 0 and in_words(good) == []


def test_one_reply_to_everything_is_a_fault_unless_the_references_are_so():
    yes = find_faults(["yes"] * 20, ["yes"] * 12 + ["no"] * 8, [True] * 20)
    assert yes.alike == 20
    assert find_faults(["yes"] * 20, ["yes"] * 19 + ["no"], [True] * 20).alike == 0
    assert find_faults(["yes"] * 3, ["no"] * 3, [True] * 3).alike == 0  # too few to say


def test_what_references_are_like_is_no_fault():
    rule = "-" * 40
    found = find_faults([rule, ""], [rule, ""], [True, True])
    assert found.faulty == 0


def test_long_replies_are_counted_quickly():
    assert circles("ab" * 100_000) and not circles("".join(chr(97 + n * n % 25) for n in range(1000)) + "xyz" * 3)
