"""Error bars and verdicts: intervals for proportions, means and ratios, and the comparison of two models.

The practice is that of E. Miller, "Adding Error Bars to Evals", arXiv:2411.00640: two models that answered the same
rows are compared by the differences row by row, which removes what is merely hard or easy about a row (section 4.2);
rows that belong together count together (section 2.2). Standard errors are jackknife ones, each unit (a row, or a
cluster of rows) left out in turn, which hold for ratios of sums over units of unequal size and for few clusters (J.
MacKinnon, M. Nielsen and M. Webb, Journal of Applied Econometrics 38 (2023) 671); degrees of freedom count units of
unequal size for as many equal ones as they are worth (L. Kish, Survey Sampling, 1965). docs/evaluation.md says which
method serves which score; benchmarks/intervals.py measures how often each interval holds the truth.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

SIGN_DRAWS = 10_000
SEED = 20_241_100
CHUNK = 4_000_000  # random numbers drawn at once: about 100 MB
SAME = 1 - 1e-9  # a draw with the very difference that was seen counts; sums of floats differ in their last bits
BEND = 4.0  # standard errors beyond which a difference of positive scores is as skewed as its logarithm is not
Z95 = 1.959963984540054  # standard normal quantile of 97.5 %
# p below which a difference counts. With 0.05, equal models are called better in 2.5 % of simulations, give or take;
# this leaves room, so that it is 2.5 % at most.
SURE = 0.04
Z_POWER = 0.8416212335729143  # of 80 %: how often a comparison of `needed_n` rows would find the difference

Values = Sequence[float] | NDArray[np.floating]
Word = Literal["better", "worse", "no difference", "can't tell"]
Scale = Literal["share", "positive", "any"]
"""Where a score lies: from 0 to 1, above 0, or anywhere. An interval stays there, and is skewed as such scores are."""


class Estimate(TypedDict):
    """A figure with its 95 % interval, the rows that it is of, and its standard error."""

    value: float
    ci95: list[float]
    n: int
    stderr: float


class Difference(Estimate):
    """A difference between two models, with the p of there being none; `changed`: how many rows or clusters differ."""

    p: float
    changed: int


class Change(TypedDict):
    """A difference as people see it."""

    value: float
    ci95: list[float]
    p: float


class Verdict(TypedDict):
    """What `verdict` returns."""

    verdict: Word
    metric: str
    base: float
    tuned: float
    difference: float
    smallest_difference: float
    ci95: list[float]
    n: int
    groups: int | None
    p: float
    needed_n: int | None
    sentence: str


@dataclass(frozen=True)
class Sums:
    """A score as a sum over rows by another sum, (rows,) each, and what each row belongs to, if rows do."""

    tops: Values
    bottoms: Values
    clusters: Sequence[Hashable] | None = None

    def units(self) -> NDArray[np.float64]:
        """The sums of each row or cluster: float64 (2, units)."""
        both = np.stack([np.asarray(self.tops, dtype=float), np.asarray(self.bottoms, dtype=float)])
        return both if self.clusters is None else _sums_by_cluster(both, self.clusters)


def clusters_of(rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The group of each row of a samples.jsonl; None where rows belong to none, and for no rows."""
    return [row["group"] for row in rows] if rows and "group" in rows[0] else None


def proportion(values: Values, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The share of ones among zeros and ones, with its Wilson 95 % interval: {value, ci95, n, stderr}.

    Source: E. B. Wilson, JASA 22 (1927) 209. Unlike value +- 1.96 standard errors it stays within 0 to 1 and has a
    width at 0 of n and n of n. Rows in `clusters` (see `ratio`) count as `effective_n` of them. Raises ValueError
    without rows.
    """
    ones = np.asarray(values, dtype=float)
    rows = len(ones)
    if rows < 1:
        raise ValueError("a proportion of no rows")
    p = float(ones.mean())
    stderr = math.sqrt(p * (1 - p) / rows) if clusters is None else standard_error(ones, clusters)
    return {"value": p, "ci95": _wilson(p, effective_n(ones, clusters)), "n": rows, "stderr": stderr}


def mean(values: Values, clusters: Sequence[Hashable] | None = None, scale: Scale = "any") -> Estimate:
    """A mean with its 95 % interval: {value, ci95, n, stderr}; `clusters` and `scale` as `ratio` has them."""
    if scale == "share" and len(values) and _zero_or_one(np.asarray(values, dtype=float)):
        return proportion(values, clusters)
    return ratio(values, np.ones(len(values)), clusters, scale)


def ratio(
    numerators: Values, denominators: Values, clusters: Sequence[Hashable] | None = None, scale: Scale = "any"
) -> Estimate:
    """sum(numerators) / sum(denominators) over rows with its 95 % interval: {value, ci95, n, stderr}.

    A row is left out as a whole, so that tokens of one reply, which are alike, don't count as independent. `clusters`
    names what each row belongs to (a document, a customer) where rows are alike for that reason: then it is clusters
    that are left out. All have shape (rows,). Raises ValueError without rows; 0 / 0 is 0.

    The interval is Student's, around the logarithm for a positive score; of a share it is Wilson's for as many zeros
    and ones as would have this standard error (E. Korn and B. Graubard, Survey Methodology 24 (1998) 193). A single
    row or cluster has no interval but all that the scale allows.
    """
    return _estimate(Sums(numerators, denominators, clusters), scale)


def perplexity(loss: Estimate) -> Estimate:
    """Perplexity of a loss in nats that `ratio` returned: value and interval are its exponentials (delta method)."""
    value = _exp(loss["value"])
    return {
        "value": value,
        "ci95": [_exp(bound) for bound in loss["ci95"]],
        "n": loss["n"],
        "stderr": value * loss["stderr"],
    }


def standard_error(values: np.ndarray, clusters: Sequence[Hashable] | None = None) -> float:
    """Jackknife standard error of the mean of `values` (rows,), infinite for one row or cluster; `clusters` as in
    `ratio`.

    Without clusters, or with clusters of one size, it is that of Miller 2024, section 2.2, times k / (k - 1) for k
    clusters: products of errors count within a cluster.
    """
    units = Sums(values, np.ones(len(values)), clusters).units()
    return float(_jackknife(float(values.mean()), _ratio(*_without_each(units))))


def effective_n(values: np.ndarray, clusters: Sequence[Hashable] | None = None) -> float:
    """How many independent zeros and ones, or differences of such, tell their mean as well as these do, (rows,).

    That is the variance of a single row over that of the mean, and all rows without clusters (L. Kish, Survey Sampling,
    1965). Where all values are equal it can't be measured, and rows of a cluster are taken to be alike. The wider t of
    few clusters is allowed for as E. Korn and B. Graubard do, Survey Methodology 24 (1998) 193.
    """
    rows = len(values)
    units = Sums(values, np.ones(rows), clusters).units()
    if units.shape[1] == rows:
        return float(rows)
    single, stderr = float(values.var()), standard_error(values, clusters)
    found = single / stderr**2 if 0 < stderr < math.inf else 0.0
    return _fewer(found or _worth(units[1]), units[1])


def paired_difference(base: Values, tuned: Values, clusters: Sequence[Hashable] | None = None) -> Difference:
    """Mean of tuned - base over the same rows in the same order: {value, ci95, n, stderr, p, changed}.

    Scores of 0 and 1 get the interval of A. Agresti and Y. Min, Statistics in Medicine 24 (2005) 729 (half a pair is
    added to each way in which a pair can come out, so that few or no rows that differ still leave a width), and
    McNemar's exact two-sided p. Others get Student's interval of the differences and the p of the sign-flip test. Rows
    in `clusters` (see `ratio`) are left out and flipped together; zeros and ones count as `effective_n` pairs. Raises
    ValueError when the two don't have the same rows.
    """
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"a paired comparison needs the same rows twice, got {before.shape} and {after.shape}")
    difference = after - before
    n = len(difference)
    together = difference if clusters is None else _sums_by_cluster(difference[None, :], clusters)[0]
    changed = int(np.count_nonzero(together))
    if not (_zero_or_one(before) and _zero_or_one(after)):
        found = mean(difference, clusters)
        shares = min(before.min(), after.min()) >= 0 and max(before.max(), after.max()) <= 1
        if not changed and shares:
            found["ci95"] = _matched_interval(0, 0, len(together))
        return {**found, "p": _sign_flip_p(together), "changed": changed}
    stderr = standard_error(difference, clusters)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    part = effective_n(difference, clusters) / n
    ci95 = _matched_interval(gained * part, lost * part, n * part)
    p = _mcnemar_p(gained, lost) if clusters is None else _sign_flip_p(together)
    return {"value": (gained - lost) / n, "ci95": ci95, "n": n, "stderr": stderr, "p": p, "changed": changed}


def paired_ratio_differences(
    base: np.ndarray,
    tuned: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    transform: Callable[[np.ndarray], np.ndarray] = np.positive,
    *,
    scale: Scale = "any",
) -> list[Difference]:
    """tuned - base of scores that are ratios of sums over rows, such as a loss a token or an F1: one Difference each.

    `base` and `tuned`: float (2, scores, rows), each row's numerators and denominators, of the same rows in the same
    order. A score is `transform` of sum / sum (np.exp makes perplexities of losses a token); 0 / 0 is 0. The interval
    is Student's with a jackknife standard error, of positive scores on a scale that bends to a logarithmic one for
    differences beyond a few standard errors; of shares of which no row changed it is that of as many pairs of zeros
    and ones. p is that of the randomisation test: in each row base and tuned change places by chance (A. Yeh, "More
    accurate tests for the statistical significance of result differences", COLING 2000). Rows in `clusters` (see
    `ratio`) are left out and change places together.
    """
    values = np.stack([base, tuned])
    *shape, rows = values.shape
    if clusters is not None:
        values = _sums_by_cluster(values.reshape(-1, rows), clusters).reshape(*shape, -1)
    n = values.shape[-1]

    def difference(sums: np.ndarray) -> np.ndarray:
        scores = transform(_ratio(sums[:, 0], sums[:, 1]))
        return scores[1] - scores[0]

    middle, gaps = values.sum(-1).mean(0)[..., None], (values[1] - values[0]) / 2
    with np.errstate(over="ignore", invalid="ignore"):  # a perplexity may be beyond all bounds
        found = difference(values.sum(-1))
        left_out = difference(_without_each(values))
        errors = _jackknife(found, left_out)
        extreme = np.zeros(len(found), dtype=int)
        for signs in _signs(n):
            shift = gaps @ signs.T
            swapped = difference(np.stack([middle - shift, middle + shift]))
            extreme += (np.abs(swapped) >= np.abs(found)[:, None] * SAME).sum(-1)
    differences: list[Difference] = []
    for score, (value, stderr, count) in enumerate(zip(found.tolist(), errors.tolist(), extreme, strict=True)):
        changed = int(np.count_nonzero(gaps[:, score].any(0)))
        if scale == "share" and not changed:
            ci95 = _matched_interval(0, 0, n)
        else:
            ci95 = _difference_interval(value, left_out[score], values[:, 1, score].sum(0), scale)
        p = (int(count) + 1) / (SIGN_DRAWS + 1)
        differences.append({"value": value, "ci95": ci95, "n": rows, "stderr": stderr, "p": p, "changed": changed})
    return differences


def unpaired_difference(first: Sums, second: Sums, scale: Scale = "any") -> Difference:
    """Second less first in a score that each has of other rows: a Difference of independent samples.

    The interval is made from those of both scores (R. Newcombe, Statistics in Medicine 17 (1998) 873, for shares; G.
    Zou and A. Donner, Statistics in Medicine 27 (2008) 1693, for others). p is Welch's, or, of shares, that of the
    N - 1 chi-squared test (I. Campbell, Statistics in Medicine 26 (2007) 3661) with as many rows as they are worth.
    """
    units = [sums.units() for sums in (first, second)]
    errors = [_estimate(sums, scale)["stderr"] for sums in (first, second)]
    degrees = _welch_degrees(*errors, *(_worth(own[1]) - 1 for own in units))
    one, other = (_estimate(sums, scale, degrees) for sums in (first, second))
    value = other["value"] - one["value"]
    (low, high), (other_low, other_high) = one["ci95"], other["ci95"]
    below = math.hypot(other["value"] - other_low, high - one["value"])
    above = math.hypot(other_high - other["value"], one["value"] - low)
    stderr = math.hypot(*errors)
    if scale == "share":
        p = _shares_p(one["value"], other["value"], *(_share_n(own, degrees) for own in units))
    else:
        p = float(2 * stdtr(degrees, -abs(value) / stderr)) if stderr else float(value == 0)
    ci95, changed = [value - below, value + above], sum(own.shape[1] for own in units)
    rows = one["n"] + other["n"]
    return {"value": value, "ci95": ci95, "n": rows, "stderr": stderr, "p": p, "changed": changed}


def verdict(
    metric: str,
    base: Values,
    tuned: Values,
    *,
    weights: Values | None = None,
    smallest: float = 0.0,
    name: str | None = None,
    is_share: bool | None = None,
    unit: str = "",
    better: str = "higher",
    row: str = "held-out row",
    clusters: Sequence[Hashable] | None = None,
) -> Verdict:
    """Say whether the tuned model is "better", "worse", no different, or one "can't tell".

    `base` and `tuned`: one value a row, in the same order, whose means, weighted by `weights` if given (a loss by its
    tokens), are the score `metric`. It is spoken of by `name` (without one, `metric`), in per cent if it `is_share`
    (without it, if all values lie between 0 and 1), else in `unit`; `better` is "higher" or "lower". `row`: what a row
    is called, in the singular. `smallest`: the smallest difference that matters; see `word`.
    Where one can't tell, `needed_n` is about how many rows would show a difference as large as this one, or as the
    smallest that matters, in 80 % of tries (Miller 2024, section 5); None if there is none.
    Returns {verdict, metric, base, tuned, difference, smallest_difference, ci95, n, groups (how many clusters, or
    None), p, needed_n, sentence}.
    """
    if is_share is None:
        is_share = all(0 <= value <= 1 for values in (base, tuned) for value in values)
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if weights is None:
        found = paired_difference(before, after, clusters)
    else:
        parts = [np.stack([own * weights, weights])[:, None] for own in (before, after)]
        (found,) = paired_ratio_differences(parts[0], parts[1], clusters, scale="positive")
    said = word(found, better == "higher", smallest)
    result: Verdict = {
        "verdict": said,
        "metric": metric,
        "base": float(np.average(before, weights=weights)),
        "tuned": float(np.average(after, weights=weights)),
        "difference": found["value"],
        "smallest_difference": smallest,
        "ci95": found["ci95"],
        "n": found["n"],
        "groups": None if clusters is None else len(set(clusters)),
        "p": found["p"],
        "needed_n": needed_n(found, smallest) if said == "can't tell" else None,
        "sentence": "",
    }
    return {**result, "sentence": _sentence(result, name or metric, is_share, unit, row)}


def is_sure(difference: Change) -> bool:
    """Whether a difference, {ci95, p, …}, counts: its interval leaves out 0, and p is below SURE.

    A bound that is no number (None in files) leaves out nothing.
    """
    low, high = difference["ci95"]
    return None not in (low, high) and (low > 0 or high < 0) and difference["p"] < SURE


def word(difference: Change | None, higher_is_better: bool, smallest: float = 0.0) -> Word:
    """A difference in a word: "better" or "worse" where it is sure and at least the `smallest` that matters, "no
    difference" where its whole interval is smaller than that, else "can't tell", as where there is none.
    """
    if difference is None:
        return "can't tell"
    if is_sure(difference) and abs(difference["value"]) >= smallest * SAME:
        return "better" if (difference["value"] > 0) == higher_is_better else "worse"
    low, high = difference["ci95"]
    return "no difference" if None not in (low, high) and -smallest < low and high < smallest else "can't tell"


def needed_n(found: Difference, smallest: float = 0.0) -> int | None:
    """Rows needed to show a difference as large as the one found, or as the `smallest`; None where both are nothing.

    Rows in clusters are taken to come in clusters of the same size as now.
    """
    effect, rows = max(abs(found["value"]), smallest), found["n"]
    if effect == 0 or not found["changed"] or not math.isfinite(found["stderr"]):
        return None
    by_power = ((Z95 + Z_POWER) * found["stderr"] / effect) ** 2
    by_sign = 6 / found["changed"]  # fewer than 6 that differ can't reach a p that low
    return max(math.ceil(max(by_power, by_sign) * rows), rows + 1)


def _sentence(result: Verdict, name: str, is_share: bool, unit: str, row: str) -> str:
    base, tuned, n = result["base"], result["tuned"], result["n"]
    scale, digits = (100, 1) if is_share else (1, 3)

    def shown(value: float, suffix: str = "") -> str:
        small = 0 < abs(value * scale) < 0.5 * 10**-digits
        return (f"{value * scale:.1g}" if small else f"{value * scale:z.{digits}f}") + suffix

    low, high = (shown(bound) for bound in result["ci95"])
    suffix = " %" if is_share else f" {unit}" if unit else ""
    points = " points" if is_share else ""
    matters = f"{shown(result['smallest_difference'])}{points}"
    rows = f"{n:,} {row}{'' if n == 1 else 's'}"
    if groups := result["groups"]:
        rows += f" in {groups:,} group{'' if groups == 1 else 's'}"
    both = f"{name} is {shown(base)} for the base and {shown(tuned, suffix)} tuned on {rows}"
    if result["verdict"] in ("better", "worse"):
        way = "up" if tuned > base else "down"
        return (
            f"The tuned model is {result['verdict']} than its base: {name} went {way} from {shown(base)} to "
            f"{shown(tuned, suffix)}, by {shown(abs(result['difference']))}{points} "
            f"(95 % interval of the difference {low} to {high}) on {rows}."
        )
    if result["verdict"] == "no difference":
        return (
            f"No difference that matters between tuned model and base: {both}, and the 95 % interval of the "
            f"difference, {low} to {high}{points}, lies within the {matters} below which none does."
        )
    if result["ci95"][0] <= 0 <= result["ci95"][1]:
        doubt = f"the 95 % interval of the difference, {low} to {high}, leaves it open"
    elif result["p"] >= SURE:
        doubt = "so few rows could show such a difference by chance"
    else:
        doubt = f"whether a difference of {low} to {high} (95 % interval) comes to the {matters} that matter is open"
    if result["difference"] == 0 and result["needed_n"] is None:
        return f"Can't tell: base and tuned model have the same {name} of {shown(base, suffix)} on {rows}."
    if result["needed_n"] is None:
        return f"Can't tell whether the tuned model is better than its base: {both}, too few to compare."
    size = "this size" if abs(result["difference"]) >= result["smallest_difference"] else f"{matters}"
    return (
        f"Can't tell whether the tuned model is better than its base: {both}, and {doubt}; "
        f"about {round_up(result['needed_n']):,} {row.split()[-1]}s would be needed to show a difference of {size}."
    )


def round_up(n: int) -> int:
    """Two leading digits: more would pretend to a precision that such an estimate hasn't."""
    step = 10 ** max(0, len(str(n)) - 2)
    return -(-n // step) * step


def _signs(n: int) -> Iterator[np.ndarray]:
    """Signs, 1.0 or -1.0, of n rows in each of SIGN_DRAWS draws, in chunks of shape (some, n)."""
    random = np.random.default_rng(SEED)
    at_once = max(1, CHUNK // n)
    for start in range(0, SIGN_DRAWS, at_once):
        yield 2.0 * random.integers(0, 2, size=(min(at_once, SIGN_DRAWS - start), n), dtype=np.int8) - 1


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where both are."""
    return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=bottom != 0)


def _without_each(values: np.ndarray) -> np.ndarray:
    """Sums over the last axis, each unit left out in turn."""
    return values.sum(-1, keepdims=True) - values


def _jackknife(value: NDArray[np.float64] | float, left_out: np.ndarray) -> np.ndarray:
    """Standard error of a score from what it is without each unit, (any, units); infinite for one unit."""
    units = left_out.shape[-1]
    if units < 2:
        return np.full(left_out.shape[:-1], math.inf)
    with np.errstate(invalid="ignore"):  # a perplexity may be beyond all bounds
        return np.sqrt((units - 1) / units * ((left_out - np.asarray(value)[..., None]) ** 2).sum(-1))


def _worth(sizes: np.ndarray) -> float:
    """How many units of one size tell as much as units of these sizes (Kish 1965, section 11.7)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else float(len(sizes))


def _margin(stderr: float, sizes: np.ndarray, degrees: float | None = None) -> float:
    """Half of Student's 95 % interval; none for what differs in no unit."""
    return stderr * _t95(_worth(sizes) - 1 if degrees is None else degrees) if stderr else 0.0


def _difference_interval(value: float, left_out: np.ndarray, sizes: np.ndarray, scale: Scale) -> list[float]:
    """95 % interval of a difference, from what it is without each unit, (units,), which have these sizes."""
    stderr = float(_jackknife(value, left_out))
    if scale != "positive" or not 0 < stderr < math.inf:
        half = _margin(stderr, sizes)
        return [value - half, value + half]
    bend = BEND * stderr
    middle = math.asinh(value / bend)
    half = _margin(float(_jackknife(middle, np.arcsinh(left_out / bend))), sizes)
    return [
        bend * math.sinh(end) if abs(end) < 700 else math.copysign(math.inf, end)
        for end in (middle - half, middle + half)
    ]


def _estimate(sums: Sums, scale: Scale, degrees: float | None = None) -> Estimate:
    """What `ratio` returns; `degrees` of freedom other than those of the units."""
    rows = len(sums.tops)
    if rows < 1:
        raise ValueError("a ratio of no rows")
    units = sums.units()
    value, left = float(_ratio(*units.sum(-1))), _ratio(*_without_each(units))
    stderr = float(_jackknife(value, left))
    if scale == "share":
        ci95 = _wilson(value, _share_n(units, degrees))
    elif scale == "positive" and value > 0 and (left > 0).all():
        half = _margin(float(_jackknife(math.log(value), np.log(left))), units[1], degrees)
        ci95 = [value * math.exp(-half), value * _exp(half)]
    else:
        half = _margin(stderr, units[1], degrees)
        ci95 = [max(0.0, value - half) if scale == "positive" else value - half, value + half]
    return {"value": value, "ci95": ci95, "n": rows, "stderr": stderr}


def _share_n(units: np.ndarray, degrees: float | None = None) -> float:
    """How many zeros and ones tell as much as a share of sums over these units, (2, units)."""
    p = float(_ratio(*units.sum(-1)))
    if (units[1] == 1).all() and _zero_or_one(units[0]):
        return float(units.shape[1])
    stderr = float(_jackknife(p, _ratio(*_without_each(units))))
    found = p * (1 - p) / stderr**2 if 0 < p < 1 and 0 < stderr < math.inf else _worth(units[1])
    return _fewer(found, units[1], degrees)


def _fewer(n: float, sizes: np.ndarray, degrees: float | None = None) -> float:
    """n, and as many fewer as Student's t is wider than the normal distribution for units of these sizes."""
    return n * (Z95 / _t95(_worth(sizes) - 1 if degrees is None else degrees)) ** 2


def _wilson(p: float, n: float) -> list[float]:
    """Wilson's 95 % interval of a share p of n."""
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return [0.0 if p == 0 else max(0.0, middle - half), 1.0 if p == 1 else min(1.0, middle + half)]


def _zero_or_one(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _sums_by_cluster(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Sums of `values` (any, rows) over the rows of each cluster: (any, clusters)."""
    numbers: dict[Hashable, int] = {}
    of_row = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    if len(of_row) != values.shape[1]:
        raise ValueError(f"{values.shape[1]} rows, but clusters of {len(of_row)}")
    return np.stack([np.bincount(of_row, weights=line) for line in values])


def _matched_interval(gained: float, lost: float, n: float) -> list[float]:
    """95 % interval of (gained - lost) / n among n matched pairs of 0 and 1: Wald's, half a pair added to each cell."""
    gained, lost, n = gained + 0.5, lost + 0.5, n + 2
    middle = (gained - lost) / n
    half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return [max(-1.0, middle - half), min(1.0, middle + half)]


def _mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p that as few of the rows that differ would go one way, if each way were as likely."""
    n = gained + lost
    ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(gained, lost) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(way - n * math.log(2)) for way in ways))


def _sign_flip_p(difference: np.ndarray) -> float:
    """Two-sided p of the mean under random signs of the rows: the share of sign patterns at least as extreme."""
    changed = difference[difference != 0]
    if not len(changed):
        return 1.0
    seen = abs(changed.sum()) * SAME
    extreme = sum(int((np.abs(signs @ changed) >= seen).sum()) for signs in _signs(len(changed)))
    return (extreme + 1) / (SIGN_DRAWS + 1)


def _shares_p(first: float, second: float, n: float, m: float) -> float:
    """Two-sided p of two shares of n and m zeros and ones being one: the N - 1 chi-squared test."""
    pooled = (n * first + m * second) / (n + m)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m) * (n + m) / max(n + m - 1, 1))
    return math.erfc(abs(second - first) / error / math.sqrt(2)) if error else float(first == second)


def _welch_degrees(first: float, second: float, degrees: float, other: float) -> float:
    """Degrees of freedom of a difference of two scores with these standard errors and degrees (Welch 1947)."""
    a, b, both = first**2, second**2, min(degrees, other)
    if not 0 < a + b < math.inf:
        return max(1.0, both)
    return max(1.0, both, (a + b) ** 2 / (a**2 / max(degrees, 1.0) + b**2 / max(other, 1.0)))


def _t95(degrees: float) -> float:
    """97.5 % quantile of Student's t, of 1 degree of freedom at least."""
    return float(stdtrit(max(1.0, degrees), 0.975))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
