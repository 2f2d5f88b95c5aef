"""Intervals and verdicts against numbers worked out by hand or by other means."""

import math

import numpy as np
import pytest

from adder import statistics


def test_wilson_interval_of_a_known_case():
    # 8 of 10, from Wilson's formula by hand: (0.49016, 0.94332).
    found = statistics.proportion(8, 10)
    assert found["value"] == 0.8 and found["n"] == 10
    assert found["ci95"] == pytest.approx([0.490162, 0.943318], abs=1e-5)
    assert found["stderr"] == pytest.approx(math.sqrt(0.8 * 0.2 / 10))


@pytest.mark.parametrize(("successes", "bounds"), [(0, (0.0, 0.0188)), (200, (0.9812, 1.0))])
def test_a_proportion_of_none_or_all_has_a_width(successes, bounds):
    # n = 200: z^2 / (n + z^2) = 3.8415 / 203.8415 = 0.018845
    assert statistics.proportion(successes, 200)["ci95"] == pytest.approx(bounds, abs=1e-4)


def test_a_bootstrapped_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 500)
    found = statistics.mean(values)
    error = values.std(ddof=1) / math.sqrt(500)
    assert found["value"] == pytest.approx(values.mean())
    assert found["stderr"] == pytest.approx(error, rel=0.05)
    assert found["ci95"] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.03)


def test_the_bootstrap_gives_the_same_numbers_each_time_and_in_chunks(monkeypatch):
    values = [0.0, 1.0, 2.0, 5.0]
    first = statistics.mean(values)
    assert statistics.mean(values) == first
    monkeypatch.setattr(statistics, "CHUNK", 4_000)
    assert statistics.mean(values)["ci95"] == pytest.approx(first["ci95"], abs=0.26)


def test_a_ratio_weighs_rows_by_their_denominator():
    found = statistics.ratio([10.0, 1.0], [10, 1])
    assert found["value"] == 1.0 and found["ci95"] == [1.0, 1.0]
    assert statistics.ratio([9.0, 3.0], [3, 3])["value"] == 2.0
    assert statistics.ratio([0.0, 0.0], [0, 0]) == {"value": 0.0, "ci95": [0.0, 0.0], "n": 2, "stderr": 0.0}


def test_tokens_of_one_row_do_not_count_as_independent():
    # 20 rows of 100 equal tokens each are 20 observations, not 2,000.
    means = np.random.default_rng(0).normal(2.0, 1.0, 20)
    clustered = statistics.ratio(means * 100, np.full(20, 100))
    pretended = statistics.mean(np.repeat(means, 100))
    assert clustered["stderr"] == pytest.approx(means.std() / math.sqrt(20), rel=0.05)
    assert clustered["stderr"] > 8 * pretended["stderr"]


def test_perplexity_is_the_exponential_of_the_loss():
    loss = {"value": 1.0, "ci95": [0.5, 1.5], "n": 7, "stderr": 0.25}
    found = statistics.perplexity(loss)
    assert found["value"] == math.e and found["ci95"] == [math.exp(0.5), math.exp(1.5)]
    assert found["stderr"] == pytest.approx(math.e * 0.25)
    assert statistics.perplexity({**loss, "value": 1e4})["value"] == math.inf


def test_pairing_sees_a_difference_that_two_separate_intervals_hide():
    base = np.random.default_rng(0).normal(0, 10, 100)
    tuned = base + np.random.default_rng(1).normal(0.5, 0.5, 100)
    found = statistics.paired_difference(base, tuned)
    assert found["ci95"][0] > 0 and found["p"] < 0.001
    assert statistics.mean(base)["ci95"][1] > statistics.mean(tuned)["ci95"][0]


def test_sign_flip_p_is_mcnemars_for_right_and_wrong():
    # 7 rows became right, 1 wrong: two-sided binomial p of 8 with at least 7 = 2 * (1 + 8) / 256 = 0.0703.
    base, tuned = [0] * 7 + [1] + [1] * 20, [1] * 7 + [0] + [1] * 20
    assert statistics.paired_difference(base, tuned)["p"] == pytest.approx(18 / 256, abs=0.01)


@pytest.mark.parametrize("rows", [([1, 0], [1]), ([], [])])
def test_other_rows_are_refused(rows):
    with pytest.raises(ValueError, match="same rows"):
        statistics.paired_difference(*rows)


def test_verdict_better_worse_and_which_way_is_better():
    low, high = np.zeros(200), np.array([1.0] * 170 + [0.0] * 30)
    better = statistics.verdict("exact_match", low, high)
    assert better["verdict"] == "better" and better["needed_n"] is None
    assert better["difference"] == 0.85 and 0.79 < better["ci95"][0] < 0.85 < better["ci95"][1] < 0.91
    assert "exact match went up from 0.0 to 85.0 %, by 85.0 points" in better["sentence"]
    assert statistics.verdict("exact_match", high, low)["verdict"] == "worse"
    losses = np.linspace(1, 2, 50)
    assert statistics.verdict("loss", losses, losses - 0.5)["verdict"] == "better"
    assert statistics.verdict("loss", losses, losses + 0.5)["verdict"] == "worse"


def test_two_rows_are_never_enough():
    found = statistics.verdict("exact_match", [0, 0], [1, 1])
    assert found["verdict"] == "can't tell" and found["needed_n"] == 6


def test_cannot_tell_says_how_many_rows_would_be_needed():
    # 30 of 100 became right, 25 wrong: mean 0.05, sd 0.74: (2.80 * 0.74 / 0.05)^2 = about 1,720 rows.
    base, tuned = [0] * 30 + [1] * 25 + [1] * 45, [1] * 30 + [0] * 25 + [1] * 45
    found = statistics.verdict("exact_match", base, tuned)
    assert found["verdict"] == "can't tell" and found["needed_n"] == pytest.approx(1720, rel=0.02)
    assert "about 1,800 rows" in found["sentence"]


def test_no_difference_at_all():
    found = statistics.verdict("loss", [1.0, 2.0], [1.0, 2.0])
    assert found["verdict"] == "can't tell" and found["needed_n"] is None and "same held-out loss" in found["sentence"]
