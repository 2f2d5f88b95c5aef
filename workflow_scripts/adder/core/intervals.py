"""Error bars and verdicts: intervals for proportions, means and ratios, and the paired comparison of two models.

The practice is that of E. Miller, "Adding Error Bars to Evals", arXiv:2411.00640: two models that answered the same
rows are compared by the differences row by row, which removes what is merely hard or easy about a row (section 4.2);
rows that belong together are drawn together (section 2.2). docs/evaluation.md says which method serves which score.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 20_241_100
CHUNK = 4_000_000  # random numbers drawn at once: about 100 MB
SAME = 1 - 1e-9  # a draw with the very difference that was seen counts; sums of floats differ in their last bits
Z95 = 1.959963984540054  # standard normal quantile of 97.5 %
Z_POWER = 0.8416212335729143  # of 80 %: how often a comparison of `needed_n` rows would find the difference

Values = Sequence[float] | NDArray[np.floating]
Word = Literal["better", "worse", "can't tell"]


class Estimate(TypedDict):
    """A figure with its 95 % interval, the rows that it is of, and its standard error."""

    value: float
    ci95: list[float]
    n: int
    stderr: float


class Difference(Estimate):
    """A difference between two models, with the p of there being none."""

    p: float


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
    ci95: list[float]
    n: int
    groups: int | None
    p: float
    needed_n: int | None
    sentence: str


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
    n = rows if clusters is None else effective_n(ones, clusters)
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    low = 0.0 if p == 0 else max(0.0, middle - half)
    high = 1.0 if p == 1 else min(1.0, middle + half)
    stderr = math.sqrt(p * (1 - p) / rows) if clusters is None else standard_error(ones, clusters)
    return {"value": p, "ci95": [low, high], "n": rows, "stderr": stderr}


def mean(values: Values, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """A mean with its bootstrap 95 % interval: {value, ci95, n, stderr}; `clusters` as `ratio` has it."""
    return ratio(values, np.ones(len(values)), clusters)


def ratio(numerators: Values, denominators: Values, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """sum(numerators) / sum(denominators) with its bootstrap 95 % interval over rows: {value, ci95, n, stderr}.

    A row is drawn as a whole, so that tokens of one reply, which are alike, don't count as independent (a cluster
    bootstrap). `clusters` names what each row belongs to (a document, a customer) where rows are alike for that
    reason: then it is clusters that are drawn. All have shape (rows,). Raises ValueError without rows; 0 / 0 is 0.
    The interval is the expanded percentile interval of T. Hesterberg, The American Statistician 69 (2015) 371: the
    plain one is too narrow for few rows, as is a normal interval with z in place of t.
    """
    both = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)])
    rows = both.shape[1]
    if rows < 1:
        raise ValueError("a ratio of no rows")
    if clusters is not None:
        both = _sums_by_cluster(both, clusters)
    n = both.shape[1]
    draws = _ratio(*np.concatenate([both @ drawn.T for drawn in _resamples(n)], axis=1))
    return {
        "value": float(_ratio(*both.sum(-1))),
        "ci95": _percentiles(draws, n),
        "n": rows,
        "stderr": float(draws.std(ddof=1)),
    }


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
    """Standard error of the mean of `values` (rows,), 0 for one row or cluster; `clusters` as `ratio` has it.

    With clusters it is that of Miller 2024, section 2.2: products of errors count within a cluster, times k / (k - 1)
    for k clusters, as n / (n - 1) for rows.
    """
    rows = len(values)
    sums, sizes = _sums_by_cluster(np.stack([values, np.ones(rows)]), range(rows) if clusters is None else clusters)
    k = len(sums)
    return math.sqrt(k / (k - 1) * ((sums - values.mean() * sizes) ** 2).sum()) / rows if k > 1 else 0.0


def effective_n(values: np.ndarray, clusters: Sequence[Hashable]) -> float:
    """How many independent rows would tell the mean as well as these, (rows,), do in their clusters; 1 for one cluster.

    That is the rows over their design effect (L. Kish, Survey Sampling, 1965): the variance of the mean with clusters
    over that without, 1 at least. Where all values are equal it can't be measured, and rows of a cluster are taken to
    be alike. The wider t of few clusters is allowed for as E. Korn and B. Graubard do, Survey Methodology 24 (1998)
    193.
    """
    rows = len(values)
    sizes = _sums_by_cluster(np.ones((1, rows)), clusters)[0]
    if len(sizes) == 1:
        return 1.0
    plain = standard_error(values)
    if plain == 0:
        found = rows**2 / float((sizes**2).sum())
    else:
        found = rows * (plain / max(plain, standard_error(values, clusters))) ** 2
    return found * (_t95(rows - 1) / _t95(len(sizes) - 1)) ** 2


def paired_difference(base: Values, tuned: Values, clusters: Sequence[Hashable] | None = None) -> Difference:
    """Mean of tuned - base over the same rows in the same order: {value, ci95, n, stderr, p}.

    Scores of 0 and 1 get the interval of A. Agresti and Y. Min, Statistics in Medicine 24 (2005) 729 (half a pair is
    added to each way in which a pair can come out, so that few or no rows that differ still leave a width), and
    McNemar's exact two-sided p. Others get a paired bootstrap's interval and the p of the sign-flip test. Rows in
    `clusters` (see `ratio`) are drawn and flipped together; zeros and ones count as `effective_n` pairs. Raises
    ValueError when the two don't have the same rows.
    """
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"a paired comparison needs the same rows twice, got {before.shape} and {after.shape}")
    difference = after - before
    n, stderr = len(difference), standard_error(difference, clusters)
    together = difference if clusters is None else _sums_by_cluster(difference[None, :], clusters)[0]
    if not (np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all()):
        return {**mean(difference, clusters), "stderr": stderr, "p": _sign_flip_p(together)}
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    part = 1.0 if clusters is None else effective_n(difference, clusters) / n
    ci95 = _matched_interval(gained * part, lost * part, n * part)
    p = _mcnemar_p(gained, lost) if clusters is None else _sign_flip_p(together)
    return {"value": (gained - lost) / n, "ci95": ci95, "n": n, "stderr": stderr, "p": p}


def paired_ratio_differences(
    base: np.ndarray,
    tuned: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    transform: Callable[[np.ndarray], np.ndarray] = np.positive,
) -> list[Difference]:
    """tuned - base of scores that are ratios of sums over rows, such as an F1: for each {value, ci95, n, stderr, p}.

    `base` and `tuned`: float (2, scores, rows), each row's numerators and denominators, of the same rows in the same
    order. A score is `transform` of sum / sum (np.exp makes perplexities of losses a token); 0 / 0 is 0. The interval
    is a paired bootstrap's. p is that of the randomisation test: in each row base and tuned change places by chance
    (A. Yeh, "More accurate tests for the statistical significance of result differences", COLING 2000). Rows in
    `clusters` (see `ratio`) are drawn and change places together.
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
        draws = np.concatenate([difference(values @ drawn.T) for drawn in _resamples(n)], axis=-1)
        extreme = np.zeros(len(found), dtype=int)
        for signs in _signs(n):
            shift = gaps @ signs.T
            swapped = difference(np.stack([middle - shift, middle + shift]))
            extreme += (np.abs(swapped) >= np.abs(found)[:, None] * SAME).sum(-1)
        return [
            {
                "value": float(value),
                "ci95": _percentiles(drawn, n),
                "n": rows,
                "stderr": float(drawn.std(ddof=1)),
                "p": (int(count) + 1) / (RESAMPLES + 1),
            }
            for value, drawn, count in zip(found, draws, extreme, strict=True)
        ]


def verdict(
    metric: str,
    base: Values,
    tuned: Values,
    *,
    name: str | None = None,
    is_share: bool | None = None,
    unit: str = "",
    better: str = "higher",
    row: str = "held-out row",
    clusters: Sequence[Hashable] | None = None,
) -> Verdict:
    """Say whether the tuned model is "better", "worse", or one "can't tell".

    `base` and `tuned`: one value a row, in the same order, whose means are the score `metric`. It is spoken of by
    `name` (without one, `metric`), in per cent if it `is_share` (without it, if all values lie between 0 and 1), else
    in `unit`; `better` is "higher" or "lower". `row`: what a row is called, in the singular.
    A difference counts when its 95 % interval leaves out 0 and p < 0.05. Otherwise `needed_n` is about how many rows
    would show a difference as large as this one in 80 % of tries (Miller 2024, section 5); None if there is none.
    Returns {verdict, metric, base, tuned, difference, ci95, n, groups (how many clusters, or None), p, needed_n,
    sentence}.
    """
    if is_share is None:
        is_share = all(0 <= value <= 1 for values in (base, tuned) for value in values)
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    found = paired_difference(before, after, clusters)
    result: Verdict = {
        "verdict": word(found, better == "higher"),
        "metric": metric,
        "base": float(before.mean()),
        "tuned": float(after.mean()),
        "difference": found["value"],
        "ci95": found["ci95"],
        "n": found["n"],
        "groups": None if clusters is None else len(set(clusters)),
        "p": found["p"],
        "needed_n": None if is_sure(found) else needed_n(after - before, clusters),
        "sentence": "",
    }
    return {**result, "sentence": _sentence(result, name or metric, is_share, unit, row)}


def is_sure(difference: Change) -> bool:
    """Whether a difference, {ci95, p, …}, counts: its interval leaves out 0, and p < 0.05. A bound that is no number
    (None in files) leaves out nothing.
    """
    low, high = difference["ci95"]
    return None not in (low, high) and (low > 0 or high < 0) and difference["p"] < 0.05


def word(difference: Change | None, higher_is_better: bool) -> Word:
    """A difference in a word: "better", "worse" or "can't tell", as where there is none."""
    if difference is None or not is_sure(difference):
        return "can't tell"
    return "better" if (difference["value"] > 0) == higher_is_better else "worse"


def needed_n(difference: np.ndarray, clusters: Sequence[Hashable] | None = None) -> int | None:
    """Rows needed to show a mean difference as large as this one; None when there is none. `difference`: (rows,).

    Rows in `clusters` are taken to come in clusters of the same size as now.
    """
    effect = abs(float(difference.mean()))
    if effect == 0:
        return None
    rows = len(difference)
    together = difference if clusters is None else _sums_by_cluster(difference[None, :], clusters)[0]
    by_power = ((Z95 + Z_POWER) * standard_error(difference, clusters) / effect) ** 2
    by_sign = 6 / np.count_nonzero(together)  # fewer than 6 that differ can't reach p < 0.05
    return max(math.ceil(max(by_power, by_sign) * rows), rows + 1)


def _sentence(result: Verdict, name: str, is_share: bool, unit: str, row: str) -> str:
    base, tuned, n = result["base"], result["tuned"], result["n"]
    scale, digits = (100, 1) if is_share else (1, 3)

    def shown(value: float, suffix: str = "") -> str:
        return f"{value * scale:z.{digits}f}{suffix}"

    low, high = (shown(bound) for bound in result["ci95"])
    suffix = " %" if is_share else f" {unit}" if unit else ""
    rows = f"{n:,} {row}{'' if n == 1 else 's'}"
    if groups := result["groups"]:
        rows += f" in {groups:,} group{'' if groups == 1 else 's'}"
    if result["verdict"] != "can't tell":
        way = "up" if tuned > base else "down"
        return (
            f"The tuned model is {result['verdict']} than its base: {name} went {way} from {shown(base)} to "
            f"{shown(tuned, suffix)}, by {shown(abs(tuned - base))}{' points' if is_share else ''} "
            f"(95 % interval of the difference {low} to {high}) on {rows}."
        )
    if result["needed_n"] is None:
        return f"Can't tell: base and tuned model have the same {name} of {shown(base, suffix)} on {rows}."
    if result["ci95"][0] <= 0 <= result["ci95"][1]:
        doubt = f"the 95 % interval of the difference, {low} to {high}, leaves it open"
    else:
        doubt = "so few rows could show such a difference by chance"
    return (
        f"Can't tell whether the tuned model is better than its base: {name} is {shown(base)} for the base and "
        f"{shown(tuned, suffix)} tuned on {rows}, and {doubt}; "
        f"about {_round_up(result['needed_n']):,} {row.split()[-1]}s would be needed to show a difference of this size."
    )


def _round_up(n: int) -> int:
    """Two leading digits: more would pretend to a precision that such an estimate hasn't."""
    step = 10 ** max(0, len(str(n)) - 2)
    return -(-n // step) * step


def _resamples(n: int) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn in each bootstrap resample, in chunks of shape (some, n)."""
    random = np.random.default_rng(SEED)
    for some in _chunks(n):
        drawn = random.integers(0, n, size=(some, n), dtype=np.int32) + n * np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=some * n).reshape(some, n).astype(float)


def _signs(n: int) -> Iterator[np.ndarray]:
    """Signs, 1.0 or -1.0, of n rows in each of RESAMPLES draws, in chunks of shape (some, n)."""
    random = np.random.default_rng(SEED)
    for some in _chunks(n):
        yield 2.0 * random.integers(0, 2, size=(some, n), dtype=np.int8) - 1


def _chunks(n: int) -> Iterator[int]:
    """How many of RESAMPLES draws of n numbers to make at once."""
    at_once = max(1, CHUNK // n)
    for start in range(0, RESAMPLES, at_once):
        yield min(at_once, RESAMPLES - start)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where both are."""
    return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=bottom != 0)


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
    return (extreme + 1) / (RESAMPLES + 1)


def _percentiles(draws: np.ndarray, n: int) -> list[float]:
    """The percentiles of `draws` that make an interval as wide as Student's t with n - 1 degrees of freedom would."""
    z = Z95 if n < 3 else _t95(n - 1) * math.sqrt(n / (n - 1))
    tail = 50 * math.erfc(z / math.sqrt(2))
    return [float(bound) for bound in np.percentile(draws, [tail, 100 - tail])]


def _t95(degrees: int) -> float:
    """97.5 % quantile of Student's t: Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5), 1 % at 3."""
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
