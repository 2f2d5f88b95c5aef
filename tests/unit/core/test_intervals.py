"""Intervals and verdicts against numbers worked out by hand or by other means."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, t, ttest_ind

from adder.core import intervals


def test_wilson_interval_of_a_known_case():
    # 8 of 10, from Wilson's formula by hand: (0.49016, 0.94332).
    found = intervals.proportion([1] * 8 + [0] * 2)
    assert found["value"] == 0.8 and found["n"] == 10
    assert found["ci95"] == pytest.approx([0.490162, 0.943318], abs=1e-5)
    assert found["stderr"] == pytest.approx(math.sqrt(0.8 * 0.2 / 10))


@pytest.mark.parametrize(("successes", "bounds"), [(0, (0.0, 0.0188)), (200, (0.9812, 1.0))])
def test_a_proportion_of_none_or_all_has_a_width(successes, bounds):
    # n = 200: z^2 / (n + z^2) = 3.8415 / 203.8415 = 0.018845
    assert intervals.proportion([1] * successes + [0] * (200 - successes))["ci95"] == pytest.approx(bounds, abs=1e-4)


def test_a_mean_has_students_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 12)
    found = intervals.mean(values)
    error = values.std(ddof=1) / math.sqrt(12)
    assert found["value"] == pytest.approx(values.mean()) and found["stderr"] == pytest.approx(error)
    half = t.ppf(0.975, 11) * error
    assert found["ci95"] == pytest.approx([values.mean() - half, values.mean() + half])


def test_an_interval_stays_where_the_score_can_be():
    values = [0.9, 1.0, 1.0, 1.0, 0.97]
    assert intervals.mean(values)["ci95"][1] > 1 > intervals.mean(values, scale="share")["ci95"][1] > 0.99
    low, high = intervals.ratio([0.1, 0.2, 3.0], [1, 1, 1], scale="positive")["ci95"]
    assert 0 < low < 1.1 < high and intervals.mean([0.1, 0.2, 3.0])["ci95"][0] < 0
    # A mean of zeros and ones is a proportion, and nothing but ones is no certainty.
    assert intervals.mean([1, 1, 0, 1], scale="share") == intervals.proportion([1, 1, 0, 1])
    assert intervals.ratio([2.0] * 12, [2.0] * 12, scale="share")["ci95"][0] < 0.8


def test_a_single_unit_has_no_interval():
    assert intervals.mean([3.0])["ci95"] == [-math.inf, math.inf]
    assert intervals.ratio([3.0, 4.0], [1, 2], ["a", "a"], "positive")["ci95"] == [0.0, math.inf]
    assert intervals.proportion([1])["ci95"][0] < 0.3
    assert intervals.verdict("loss", [2.0], [1.0], better="lower", is_share=False)["verdict"] == "can't tell"
    alone = intervals.verdict("loss", [2.0], [1.0], weights=[7.0], better="lower", is_share=False)
    assert alone["verdict"] == "can't tell" and "too few to compare" in alone["sentence"]


def test_a_ratio_weighs_rows_by_their_denominator():
    found = intervals.ratio([10.0, 1.0], [10, 1])
    assert found["value"] == 1.0 and found["ci95"] == [1.0, 1.0]
    assert intervals.ratio([9.0, 3.0], [3, 3])["value"] == 2.0
    assert intervals.ratio([0.0, 0.0], [0, 0]) == {"value": 0.0, "ci95": [0.0, 0.0], "n": 2, "stderr": 0.0}


def test_tokens_of_one_row_do_not_count_as_independent():
    # 20 rows of 100 equal tokens each are 20 observations, not 2,000.
    means = np.random.default_rng(0).normal(2.0, 1.0, 20)
    clustered = intervals.ratio(means * 100, np.full(20, 100))
    pretended = intervals.mean(np.repeat(means, 100))
    assert clustered["stderr"] == pytest.approx(means.std() / math.sqrt(20), rel=0.05)
    assert clustered["stderr"] > 8 * pretended["stderr"]


def test_perplexity_is_the_exponential_of_the_loss():
    loss = {"value": 1.0, "ci95": [0.5, 1.5], "n": 7, "stderr": 0.25}
    found = intervals.perplexity(loss)
    assert found["value"] == math.e and found["ci95"] == [math.exp(0.5), math.exp(1.5)]
    assert found["stderr"] == pytest.approx(math.e * 0.25)
    assert intervals.perplexity({**loss, "value": 1e4})["value"] == math.inf


def test_pairing_sees_a_difference_that_two_separate_intervals_hide():
    base = np.random.default_rng(0).normal(0, 10, 100)
    tuned = base + np.random.default_rng(1).normal(0.5, 0.5, 100)
    found = intervals.paired_difference(base, tuned)
    assert found["ci95"][0] > 0 and found["p"] < 0.001
    assert intervals.mean(base)["ci95"][1] > intervals.mean(tuned)["ci95"][0]


def test_right_and_wrong_get_mcnemars_exact_p():
    # 7 rows became right, 1 wrong: two-sided binomial p of 8 with at least 7 = 2 * (1 + 8) / 256 = 0.0703.
    base, tuned = [0] * 7 + [1] + [1] * 20, [1] * 7 + [0] + [1] * 20
    assert intervals.paired_difference(base, tuned)["p"] == pytest.approx(18 / 256, rel=1e-9)
    # The sign-flip test, which serves other scores, is its Monte Carlo version: 10,000 draws, 4 standard errors.
    flipped = intervals.paired_difference(np.multiply(base, 0.5), np.multiply(tuned, 0.5))["p"]
    assert flipped == pytest.approx(18 / 256, abs=0.01)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 5), (0, 6), (400, 460), (3000, 2800)])
def test_mcnemars_p_is_the_binomial_tests(gained, lost):
    base, tuned = [0] * gained + [1] * lost + [1], [1] * gained + [0] * lost + [1]
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert intervals.paired_difference(base, tuned)["p"] == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_a_difference_of_shares_by_hand():
    # Agresti and Min with 10 gained, 4 lost of 50: (10.5 - 4.5) / 52 -+ 1.96 / 52 * sqrt(15 - 36 / 52)
    base, tuned = [0] * 10 + [1] * 4 + [1] * 36, [1] * 10 + [0] * 4 + [1] * 36
    found = intervals.paired_difference(base, tuned)
    middle, half = 6 / 52, 1.96 / 52 * math.sqrt(15 - 36 / 52)
    assert found["value"] == pytest.approx(0.12) and found["n"] == 50
    assert found["ci95"] == pytest.approx([middle - half, middle + half], abs=1e-4)


def test_no_changed_row_is_not_certainty():
    """30 rows with the same answers leave room for a difference of several points; a bootstrap would say 0 to 0."""
    low, high = intervals.paired_difference([1] * 30, [1] * 30)["ci95"]
    assert low == pytest.approx(-high) and 0.05 < high < 0.08


def test_rows_of_one_cluster_do_not_count_as_independent():
    random = np.random.default_rng(3)
    of_cluster = random.normal(0.3, 1.0, 30)
    base, tuned, clusters = np.zeros(150), np.repeat(of_cluster, 5), np.repeat(np.arange(30), 5)
    found = intervals.paired_difference(base, tuned, clusters)
    assert found["stderr"] == pytest.approx(of_cluster.std() / math.sqrt(30), rel=0.05) and found["n"] == 150
    assert found["value"] == pytest.approx(of_cluster.mean())
    assert found["p"] == pytest.approx(intervals.paired_difference(np.zeros(30), of_cluster)["p"], abs=0.02)
    assert intervals.paired_difference(base, tuned)["stderr"] < 0.6 * found["stderr"]


def test_clusters_of_one_row_change_nothing():
    base, tuned = np.linspace(0, 1, 40), np.linspace(0, 1.3, 40)
    names = [f"row {n}" for n in range(40)]
    single, plain = intervals.paired_difference(base, tuned, names), intervals.paired_difference(base, tuned)
    assert single["ci95"] == plain["ci95"] and single["p"] == plain["p"]
    small = (tuned - base) * 0 + np.tile([1.0, -0.8], 20)
    needed = [intervals.needed_n(intervals.paired_difference(small * 0, small, of)) for of in (names, None)]
    assert needed[0] == needed[1]


def test_the_clustered_standard_error_of_equal_clusters_is_millers():
    # Section 2.2: the root of the sum of (s_i - mean)(s_j - mean) over pairs of one cluster, over n; times k / (k - 1).
    values, clusters = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b", "c", "c"]
    centred = values - 0.5
    together = [[one == other for other in clusters] for one in clusters]
    expected = math.sqrt(1.5 * (centred[:, None] * centred * together).sum()) / 6
    assert intervals.standard_error(values, clusters) == pytest.approx(expected)
    assert intervals.standard_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(6))


def test_shares_of_rows_in_clusters_are_less_sure():
    answers = np.random.default_rng(5).integers(0, 2, 60)
    rows, clusters = np.repeat(answers, 5), np.repeat(np.arange(60), 5)
    alike, alone = intervals.proportion(rows, clusters), intervals.proportion(answers)
    # Five alike rows tell what one does, but for t with 59 degrees of freedom in the place of z: 4 % in n.
    assert intervals.effective_n(rows, clusters) == pytest.approx(60, rel=0.06)
    assert alike["ci95"] == pytest.approx(alone["ci95"], abs=0.01) and alike["n"] == 300
    assert alike["stderr"] == pytest.approx(alone["stderr"], rel=0.02)
    # Clusters of one row are rows.
    assert intervals.proportion(rows, range(300))["ci95"] == pytest.approx(intervals.proportion(rows)["ci95"])
    # None of 300 in 60 clusters leaves what none of 60 leaves, and one cluster next to everything.
    none = intervals.proportion([0] * 300, clusters)["ci95"][1]
    assert none == pytest.approx(intervals.proportion([0] * 60)["ci95"][1], rel=0.05)
    assert intervals.proportion([0] * 300, ["one"] * 300)["ci95"][1] > 0.7
    same = intervals.paired_difference([1] * 300, [1] * 300, clusters)["ci95"]
    assert same == pytest.approx(intervals.paired_difference([1] * 60, [1] * 60)["ci95"], rel=0.05)


def test_a_verdict_counts_the_groups():
    base, tuned = np.zeros(40), np.repeat([1.0, 1.0, 1.0, 0.0], 10)
    assert intervals.verdict("exact_match", base, tuned)["verdict"] == "better"
    grouped = intervals.verdict("exact_match", base, tuned, clusters=np.arange(40) // 10)
    assert grouped["verdict"] == "can't tell" and grouped["groups"] == 4 and grouped["needed_n"] > 60
    assert "on 40 held-out rows in 4 groups, and" in grouped["sentence"]


def counts(rights, given, expected):
    """Numerators and denominators of one F1, as `paired_ratio_differences` wants them."""
    return np.array([[2 * np.asarray(rights)], [np.add(given, expected)]], dtype=float)


def test_pairing_sees_a_difference_of_f1_that_two_separate_intervals_hide():
    random = np.random.default_rng(2)
    expected = np.full(120, 5)
    right = random.binomial(5, random.beta(0.5, 0.5, 120))  # rows are hard or easy
    more = np.minimum(right + (np.arange(120) % 6 == 0), 5)
    base, tuned = counts(right, expected, expected), counts(more, expected, expected)
    (found,) = intervals.paired_ratio_differences(base, tuned)
    assert found["value"] == pytest.approx((more.sum() - right.sum()) / 600)
    assert found["ci95"][0] > 0 and found["p"] < 0.01
    separate = [intervals.ratio(*one[:, 0])["ci95"] for one in (base, tuned)]
    assert separate[0][1] > separate[1][0]
    # With equal denominators an F1 is a mean.
    plain = intervals.paired_difference(right / 5, more / 5)
    assert found["ci95"] == pytest.approx(plain["ci95"], abs=1e-9)
    assert found["p"] == pytest.approx(plain["p"], abs=0.01)  # other signs, for rows without a difference draw none


def test_perplexities_and_losses_agree_on_which_is_better():
    random = np.random.default_rng(3)
    tokens = random.integers(5, 60, 50)
    losses = random.gamma(4, 0.5, 50)
    parts = [np.stack([losses * factor * tokens, tokens])[:, None] for factor in (1.0, 0.9)]
    (found,) = intervals.paired_ratio_differences(*parts, transform=np.exp)
    means = [(losses * factor * tokens).sum() / tokens.sum() for factor in (1.0, 0.9)]
    assert found["value"] == pytest.approx(math.exp(means[1]) - math.exp(means[0]))
    (loss,) = intervals.paired_ratio_differences(*parts)
    assert found["p"] == loss["p"] < 0.001 and found["ci95"][1] < 0
    (same,) = intervals.paired_ratio_differences(parts[0], parts[0], transform=np.exp)
    assert same["value"] == 0 and same["p"] == 1.0 and not intervals.is_sure(same)
    beyond = parts[0] * np.array([1e4, 1.0])[:, None, None]
    assert not intervals.is_sure(intervals.paired_ratio_differences(beyond, parts[1], transform=np.exp)[0])


def test_several_ratios_are_each_what_they_are_alone():
    random = np.random.default_rng(4)
    base, tuned = (random.integers(0, 4, (2, 3, 30)).astype(float) for _ in range(2))
    clusters = np.arange(30) // 3
    together = intervals.paired_ratio_differences(base, tuned, clusters)
    for score, found in enumerate(together):
        (alone,) = intervals.paired_ratio_differences(base[:, [score]], tuned[:, [score]], clusters)
        assert found["p"] == alone["p"] and found["value"] == pytest.approx(alone["value"])
        assert found["ci95"] == pytest.approx(alone["ci95"], rel=1e-9)  # sums in another order


def test_more_rows_are_needed_where_they_come_in_clusters():
    random = np.random.default_rng(4)
    of_cluster = random.normal(0.1, 1.0, 40)
    alone = intervals.paired_difference(np.zeros(40), of_cluster)
    together = intervals.paired_difference(np.zeros(200), np.repeat(of_cluster, 5), np.arange(200) // 5)
    assert intervals.needed_n(together) == pytest.approx(5 * intervals.needed_n(alone), rel=0.01)


def test_clusters_must_name_each_row():
    with pytest.raises(ValueError, match="3 rows, but clusters of 2"):
        intervals.paired_difference([1, 2, 3], [1, 2, 4], ["a", "b"])


# ---- calibration: what is said to happen in 95 % of cases does, in simulations that never change

TRIES = 300
COVERED = 0.917  # 0.95 less 2.6 standard errors of a share of 300: falsely broken about once in 200 changes of the seed


def compare_often(monkeypatch, draw, truth):
    """Shares of TRIES in which the interval held the truth, and in which "better" or "worse" was said."""
    monkeypatch.setattr(intervals, "SIGN_DRAWS", 500)  # enough for a share of intervals, and quick
    random = np.random.default_rng(7)
    held = said = 0
    for _ in range(TRIES):
        found = intervals.paired_difference(*draw(random))
        held += found["ci95"][0] <= truth <= found["ci95"][1]
        said += intervals.is_sure(found)
    return held / TRIES, said / TRIES


def answers(random, n, base, tuned):
    """Right and wrong answers of two models that mostly fail at the same questions."""
    luck, own = random.random(n), random.random(n)
    return (luck < base).astype(float), np.where(own < 0.6, luck < tuned, random.random(n) < tuned).astype(float)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("level", [0.05, 0.5])
def test_equal_models_are_seldom_told_apart(monkeypatch, n, level):
    held, said = compare_often(monkeypatch, lambda random: answers(random, n, level, level), 0.0)
    assert held >= COVERED and said <= 1 - COVERED


def test_the_interval_of_shares_holds_a_true_difference(monkeypatch):
    held, said = compare_often(monkeypatch, lambda random: answers(random, 60, 0.3, 0.5), 0.2)
    assert held >= COVERED and said > 0.5


@pytest.mark.parametrize("n", [15, 60])
def test_the_interval_of_means_holds_a_true_difference(monkeypatch, n):
    def draw(random):
        base = random.normal(0, 1, n)
        return base, base + random.normal(0.1, 0.5, n)

    held, _ = compare_often(monkeypatch, draw, 0.1)
    assert held >= COVERED


def test_equal_models_on_clustered_rows(monkeypatch):
    def draw(random):
        together = np.repeat(random.normal(0, 0.5, 25), 4)
        return random.normal(0, 0.01, 100), together + random.normal(0, 0.5, 100), np.arange(100) // 4

    held, said = compare_often(monkeypatch, draw, 0.0)
    assert held >= COVERED and said <= 1 - COVERED
    ignored, falsely = compare_often(monkeypatch, lambda random: draw(random)[:2], 0.0)
    assert ignored < 0.88 and falsely > 0.1  # what the clusters are for


def test_equal_models_on_clustered_answers(monkeypatch):
    def draw(random):
        luck = np.repeat(random.random(25), 4)  # rows of a cluster are as hard as each other
        made = [(np.where(random.random(100) < 0.7, luck, random.random(100)) < 0.4).astype(float) for _ in range(2)]
        swap = np.repeat(random.random(25) < 0.3, 4)  # and a model has its own way with some clusters
        return made[0], np.where(swap, np.repeat(random.random(25) < 0.4, 4), made[1]), np.arange(100) // 4

    held, said = compare_often(monkeypatch, draw, 0.0)
    assert held >= COVERED and said <= 1 - COVERED
    ignored, _ = compare_often(monkeypatch, lambda random: draw(random)[:2], 0.0)
    assert ignored < 0.9


def test_the_interval_of_a_ratio_holds_a_true_difference(monkeypatch):
    """F1 of replies that give some values: what is right of it is unlike from row to row."""

    def f1(random, skill, easy):
        given = random.integers(2, 7, 60)
        return counts(random.binomial(given, np.clip(easy + skill, 0, 1)), given, given)

    monkeypatch.setattr(intervals, "SIGN_DRAWS", 500)
    random = np.random.default_rng(9)
    held = said = 0
    for number in range(TRIES):
        easy, gain = random.uniform(0.2, 0.6, 60), 0.1 * (number % 2)
        (found,) = intervals.paired_ratio_differences(f1(random, 0.0, easy), f1(random, gain, easy))
        held += found["ci95"][0] <= gain <= found["ci95"][1]
        said += gain == 0 and intervals.is_sure(found)
    assert held / TRIES >= COVERED and said / (TRIES / 2) <= 0.1


@pytest.mark.parametrize("rows", [([1, 0], [1]), ([], [])])
def test_other_rows_are_refused(rows):
    with pytest.raises(ValueError, match="same rows"):
        intervals.paired_difference(*rows)


def test_verdict_better_worse_and_which_way_is_better():
    low, high = np.zeros(200), np.array([1.0] * 170 + [0.0] * 30)
    better = intervals.verdict("exact_match", low, high, name="exact match")
    assert better["verdict"] == "better" and better["needed_n"] is None
    assert better["difference"] == 0.85 and 0.79 < better["ci95"][0] < 0.85 < better["ci95"][1] < 0.91
    assert "exact match went up from 0.0 to 85.0 %, by 85.0 points" in better["sentence"]
    assert intervals.verdict("exact_match", high, low)["verdict"] == "worse"
    losses = np.linspace(1, 2, 50)
    assert intervals.verdict("loss", losses, losses - 0.5, better="lower")["verdict"] == "better"
    assert intervals.verdict("loss", losses, losses + 0.5, better="lower")["verdict"] == "worse"


def test_a_score_of_any_task():
    base, tuned = np.array([0.0, 1.0] * 50), np.array([1.0, 1.0] * 50)
    found = intervals.verdict("exact_match,strict-match", base, tuned, name="GSM8K", row="question")
    assert found["verdict"] == "better" and found["metric"] == "exact_match,strict-match"
    assert "GSM8K went up from 50.0 to 100.0 %, by 50.0 points" in found["sentence"]
    assert found["sentence"].endswith("on 100 questions.")
    worse = intervals.verdict("words", base * 9, tuned * 9, better="lower")
    assert worse["verdict"] == "worse" and "words went up from 4.500 to 9.000, by 4.500 (" in worse["sentence"]
    assert "from 0.500 to 1.000" in intervals.verdict("acc", base, tuned, is_share=False)["sentence"]
    assert "about " in (unsure := intervals.verdict("acc", base[:9], 1 - base[:9], row="question")["sentence"])
    assert "questions would be needed" in unsure


def test_a_unit_stands_behind_the_second_value():
    values, how = np.linspace(1, 4, 40), {"unit": "nats per token", "better": "lower"}
    found = intervals.verdict("loss", values, values + 0.1, name="held-out loss", **how)
    assert "held-out loss went up from 2.500 to 2.600 nats per token, by 0.100 (95 %" in found["sentence"]


def test_two_rows_are_never_enough():
    found = intervals.verdict("exact_match", [0, 0], [1, 1])
    assert found["verdict"] == "can't tell" and found["needed_n"] == 6


def test_cannot_tell_says_how_many_rows_would_be_needed():
    # 30 of 100 became right, 25 wrong: mean 0.05, sd 0.74: (2.80 * 0.74 / 0.05)^2 = about 1,720 rows.
    base, tuned = [0] * 30 + [1] * 25 + [1] * 45, [1] * 30 + [0] * 25 + [1] * 45
    found = intervals.verdict("exact_match", base, tuned)
    assert found["verdict"] == "can't tell" and found["needed_n"] == pytest.approx(1720, rel=0.02)
    assert "about 1,800 rows" in found["sentence"]


def test_no_difference_at_all():
    found = intervals.verdict("loss", [1.0, 2.0], [1.0, 2.0], name="held-out loss")
    assert found["verdict"] == "can't tell" and found["needed_n"] is None and "same held-out loss" in found["sentence"]


def test_a_difference_too_small_to_matter_is_neither_better_nor_worse():
    """However sure it is: 200 losses that all fell by two ten-thousandths."""
    losses = np.linspace(6, 7, 200)
    how = {"better": "lower", "unit": "nats per token", "name": "held-out loss", "is_share": False}
    assert intervals.verdict("loss", losses, losses - 2e-4, **how)["verdict"] == "better"
    found = intervals.verdict("loss", losses, losses - 2e-4, smallest=0.01, **how)
    assert found["verdict"] == "no difference" and found["needed_n"] is None
    assert found["sentence"].startswith("No difference that matters")
    assert "-0.0002 to -0.0002, lies within the 0.010" in found["sentence"]
    assert intervals.verdict("loss", losses, losses - 0.01, smallest=0.01, **how)["verdict"] == "better"
    # Sure, too small, and perhaps not: one can't tell whether it matters.
    noisy = losses - 0.008 + 0.04 * np.sin(np.arange(200))
    open_ = intervals.verdict("loss", losses, noisy, smallest=0.01, **how)
    assert open_["verdict"] == "can't tell" and "comes to the 0.010 that matter is open" in open_["sentence"]


def test_models_on_different_rows_are_compared_by_welch():
    random = np.random.default_rng(1)
    one, other = random.normal(2, 1, 14), random.normal(3, 2, 9)
    found = intervals.unpaired_difference(*(intervals.Sums(own, np.ones(len(own))) for own in (one, other)))
    expected = ttest_ind(other, one, equal_var=False)
    assert found["value"] == pytest.approx(other.mean() - one.mean()) and found["p"] == pytest.approx(expected.pvalue)
    assert found["ci95"] == pytest.approx(list(expected.confidence_interval()))


def test_a_loss_on_different_rows_is_as_sure_as_a_ratio_is():
    """Long and short rows at one loss a token: their lengths are no part of the doubt."""
    tokens = np.array([5.0, 500.0] * 40)
    losses = 1.0 + 0.01 * np.sin(np.arange(80))
    sums = [intervals.Sums(factor * losses * tokens, tokens) for factor in (1.0, 1.05)]
    low, high = intervals.unpaired_difference(*sums, "positive")["ci95"]
    assert 0.04 < low < 0.05 < high < 0.06


def test_shares_on_different_rows():
    ones = [intervals.Sums([1.0] * right + [0.0] * (20 - right), np.ones(20)) for right in (4, 15)]
    found = intervals.unpaired_difference(*ones, "share")
    # Newcombe's method 10 by hand: from Wilson's 0.0807 to 0.4160 and 0.5313 to 0.8881.
    below, above = math.hypot(0.75 - 0.5313, 0.4160 - 0.2), math.hypot(0.8881 - 0.75, 0.2 - 0.0807)
    assert found["ci95"] == pytest.approx([0.55 - below, 0.55 + above], abs=2e-4) and found["p"] < 0.001
    two = [intervals.Sums([value] * 2, np.ones(2)) for value in (0.0, 1.0)]
    assert intervals.unpaired_difference(*two, "share")["p"] > 0.05  # two of two against none is no proof


# ---- the short form of benchmarks/intervals.py, whose figures are in benchmarks/results/intervals.json

spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parents[3] / "benchmarks" / "intervals.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("name", list(benchmark.ARMS))
def test_each_interval_that_the_report_prints_holds_the_truth(monkeypatch, name, clustered):
    monkeypatch.setattr(intervals, "SIGN_DRAWS", 10)
    for n in (12, 50):
        held = benchmark.coverage(name, n, clustered, TRIES)["coverage"]
        assert held >= 0.9, (n, held)  # 0.95 less four standard errors: there are many arms


@pytest.mark.parametrize("metric", ["exact_match", "loss"])
def test_equal_models_are_seldom_called_better(monkeypatch, metric):
    monkeypatch.setattr(intervals, "SIGN_DRAWS", 500)
    said = benchmark.verdict(metric, 40, False, TRIES)
    assert said["better"] <= 0.025 + 2.6 * math.sqrt(0.025 * 0.975 / TRIES)


def test_the_figures_on_record_are_within_what_is_claimed():
    """As docs/evaluation.md says of them."""
    record = json.loads((Path(benchmark.__file__).parent / "results" / "intervals.json").read_text())
    assert {row["interval"] for row in record["coverage"]} == set(benchmark.ARMS)
    held = [row["coverage"] for row in record["coverage"] if row["n"] >= 12]
    assert len(held) == 160 and all(0.935 <= one <= 0.965 for one in held)
    assert {row["n"] for row in record["coverage"]} == set(benchmark.SIZES) == {row["n"] for row in record["verdict"]}
    assert all(row["better"] <= 0.025 and row["draws"] >= 1000 for row in record["verdict"])
