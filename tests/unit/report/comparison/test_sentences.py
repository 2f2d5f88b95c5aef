"""The comparison in words."""

import pytest

from adder.report.comparison import facts, sentences


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.0123, "exact_match", "+1.2\u00a0points"), (-0.0123, "exact_match", "−1.2\u00a0points"),
        (-0.0001, "exact_match", "0.0\u00a0points"), (-0.25, "loss", "−0.250"), (0.0, "loss", "0"),
    ],
)  # fmt: skip
def test_differences_have_a_sign_unless_they_are_nothing(value, metric, text):
    assert sentences.change(value, metric) == text


def test_many_names_are_not_listed_in_full():
    assert sentences.listed(["a"]) == "a" and sentences.listed(["a", "b", "c"]) == "a, b and c"
    assert sentences.listed(list("abcdef")) == "a, b, c and 3 other runs"


def test_a_price_is_told_only_where_there_is_one():
    assert sentences.spent(facts.RunCost(342.6, None, None)) == "5\u00a0min 43\u00a0s"
    assert sentences.spent(facts.RunCost(342.6, 0.25, "EUR")) == "5\u00a0min 43\u00a0s, 0.25\u00a0EUR"


def test_abbreviations_keep_their_capitals_within_a_sentence():
    assert [sentences.lower(name) for name in ("Exact match", "ROUGE-L", "chrF")] == ["exact match", "ROUGE-L", "chrF"]
