"""Numbers as people write them."""

from fractions import Fraction

import pytest

from adder.evaluation.quantities import habit, parse_quantity, same_quantity


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("3/4", Fraction(3, 4), ""),
        ("1 1/2", Fraction(3, 2), ""),
        ("1½", Fraction(3, 2), ""),
        ("1,234,567.5", Fraction(2469135, 2), ""),
        ("1.234.567,5", Fraction(2469135, 2), ""),
        ("12 345", 12345, ""),
        ("3,5", Fraction(7, 2), ""),
        ("1,234", 1234, ""),
        ("1.234", Fraction(1234, 1000), ""),
        ("5e3", 5000, ""),
        ("2.5 × 10^-3", Fraction(25, 10000), ""),
        ("−3", -3, ""),
        ("-$1,000.50", Fraction(-2001, 2), "$"),
        ("18 dollars", 18, "$"),
        ("25 %", 25, "%"),
        ("7 apples.", 7, "apple"),
        ("10 m²", 10, "m²"),
        ("**42**", 42, ""),
        ("$\\frac{3}{4}$", Fraction(3, 4), ""),
        ("\\boxed{42}", 42, ""),
        ("\\frac34", Fraction(3, 4), ""),
        ("-\\dfrac{1}{2}", Fraction(-1, 2), ""),
        ("\\frac{-1}{2}", Fraction(-1, 2), ""),
        ("5\\%", 5, "%"),
        ("\\$5", 5, "$"),
        ("5\\text{ cm}", 5, "cm"),
        ("3×10⁸", 300_000_000, ""),
        ("USD 5", 5, "$"),
        ("1.5 million dollars", 1_500_000, "$"),
        ("2.5k", 2500, ""),
        ("3 dozen eggs", 36, "egg"),
        ("90 degrees", 90, "°"),
        ("5 minutes", 5, "min"),
    ],
)
def test_what_is_a_number(text, value, unit):
    found = parse_quantity(text)
    assert found == (value, unit) and same_quantity(found, found)


@pytest.mark.parametrize(
    "text",
    [
        *("", "abc", "10:30", "1:2", "3-5", "2024-01-02", "3/4/2024", "1/0", "1,2,3", "12 and 13", "1e999", "--3"),
        *("5x", "5i", "3!", "5th", "2 to 3", "1 or 2"),
    ],
)
def test_what_is_none(text):
    assert parse_quantity(text) is None


def test_the_same_digits_under_another_habit():
    assert parse_quantity("1.234", "comma") == (1234, "") and parse_quantity("1,234", "comma") == (
        Fraction(1234, 1000),
        "",
    )
    assert parse_quantity("3.5", "comma") == parse_quantity("3,5", "comma")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["3,5", "12,25"], "comma"),
        (["1.234,5", "1,234"], "comma"),
        (["2.000.000"], "comma"),
        (["1,234.5"], "point"),
        (["1,234", "5"], "point"),  # nothing tells
        ([], "point"),
    ],
)
def test_the_habit_is_told_by_what_can_be_read_in_one_way(texts, expected):
    assert habit(texts) == expected


def test_units_are_compared_where_both_have_one():
    one, other = parse_quantity("5 km"), parse_quantity("5 m")
    assert not same_quantity(one, other) and same_quantity(one, parse_quantity("5"))
    assert same_quantity(parse_quantity("18 $"), parse_quantity("18 dollars"))
    assert not same_quantity(parse_quantity("3 Mb"), parse_quantity("3 mb"))
    assert same_quantity(parse_quantity("50 %"), parse_quantity("1/2"))
