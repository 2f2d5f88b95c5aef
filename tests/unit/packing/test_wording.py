"""Words that the sentences about lengths share."""

from typing import get_args

from adder.packing.wording import LONGER, Truncate, counted


def test_one_is_one_and_thousands_are_set_apart():
    assert [counted(n, "example") for n in (0, 1, 2, 12345)] == [
        "0 examples",
        "1 example",
        "2 examples",
        "12,345 examples",
    ]


def test_every_way_to_truncate_has_its_words():
    assert set(LONGER) == set(get_args(Truncate))
