"""Error bars and verdicts: intervals for proportions, means and ratios, and the paired comparison of two models.

The practice is that of E. Miller, "Adding Error Bars to Evals", arXiv:2411.00640: two models that answered the same
rows are compared by the differences row by row, which removes what is merely hard or easy about a row (section 4.2);
rows that belong together are drawn together (section 2.2). docs/evaluation.md says which method serves which score.
"""

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 20_241_100
CHUNK = 4_000_000  # random numbers drawn at once: about 60 MB
Z95 = 1.959963984540054  # standard normal quantile of 97.5 %
Z_POWER = 0.8416212335729143  # of 80 %: how often a comparison of `needed_n` rows would find the difference

# How a score is spoken of: its name, whether it is a share (shown in per cent), its unit, and which way is better.
SCORES = {
    "exact_match": ("exact match", True, "", "higher"),
    "field_f1": ("field F1", True, "", "higher"),
    "json_valid": ("the share of valid JSON", True, "", "higher"),
    "rouge_l": ("ROUGE-L", True, "", "higher"),
    "chrf": ("chrF", True, "", "higher"),
    "loss": ("held-out loss", False, " nats per token", "lower"),
    "perplexity": ("perplexity", False, "", "lower"),
}


def proportion(successes: int, n: int) -> dict:
    """A proportion with its Wilson 95 % interval: {value, ci95, n, stderr}. Raises ValueError for n = 0.

    Source: E. B. Wilson, JASA 22 (1927) 209. Unlike value +- 1.96 standard errors it stays within 0 to 1 and has a
    width at 0 of n and n of n.
    """
    if n < 1:
        raise ValueError("a proportion of no rows")
    p = successes / n
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return {"value": p, "ci95": [low, high], "n": n, "stderr": math.sqrt(p * (1 - p) / n)}


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict:
    """A mean with its bootstrap 95 % interval: {value, ci95, n, stderr}; `clusters` as `ratio` has it."""
    return ratio(values, np.ones(len(values)), clusters)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> dict:
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
    sums = np.concatenate([both[:, drawn].sum(-1) for drawn in _resamples(n)], axis=1)
    draws = np.divide(sums[0], sums[1], out=np.zeros(sums.shape[1]), where=sums[1] != 0)
    top, bottom = both.sum(-1)
    return {
        "value": float(top / bottom) if bottom else 0.0,
        "ci95": _percentiles(draws, n),
        "n": rows,
        "stderr": float(draws.std(ddof=1)),
    }


def perplexity(loss: dict) -> dict:
    """Perplexity of a loss in nats that `ratio` returned: value and interval are its exponentials (delta method)."""
    value = _exp(loss["value"])
    return {
        "value": value,
        "ci95": [_exp(bound) for bound in loss["ci95"]],
        "n": loss["n"],
        "stderr": value * loss["stderr"],
    }


def paired_difference(
    base: Sequence[float], tuned: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> dict:
    """Mean of tuned - base over the same rows in the same order: {value, ci95, n, stderr, p}.

    Scores of 0 and 1 get the interval of A. Agresti and Y. Min, Statistics in Medicine 24 (2005) 729 (half a pair is
    added to each way in which a pair can come out, so that few or no rows that differ still leave a width), and
    McNemar's exact two-sided p. Others, and rows in `clusters` (see `ratio`), get a paired bootstrap's interval and
    the p of the sign-flip test. Raises ValueError when the two don't have the same rows.
    """
    base, tuned = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if base.shape != tuned.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"a paired comparison needs the same rows twice, got {base.shape} and {tuned.shape}")
    difference = tuned - base
    if clusters is not None:
        by_cluster = _sums_by_cluster(difference[None, :], clusters)[0]
        return {**mean(difference, clusters), "p": _sign_flip_p(by_cluster)}
    n = len(difference)
    stderr = float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    if np.isin(base, (0, 1)).all() and np.isin(tuned, (0, 1)).all():
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        ci95, p = _matched_interval(gained, lost, n), _mcnemar_p(gained, lost)
        return {"value": (gained - lost) / n, "ci95": ci95, "n": n, "stderr": stderr, "p": p}
    return {**mean(difference), "stderr": stderr, "p": _sign_flip_p(difference)}


def verdict(
    metric: str,
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    name: str | None = None,
    is_share: bool | None = None,
    better: str | None = None,
    row: str = "held-out row",
    clusters: Sequence[Hashable] | None = None,
) -> dict:
    """Say whether the tuned model is "better", "worse", or one "can't tell".

    `base` and `tuned`: one value a row, in the same order, whose means are the score `metric`. How the score is spoken
    of is known for those of SCORES; for any other it is `name` (without one, `metric`), `is_share` (without it, whether
    all values lie between 0 and 1) and `better` ("higher", or "lower"). `row`: what a row is called, in the singular.
    A difference counts when its 95 % interval leaves out 0 and p < 0.05. Otherwise `needed_n` is about how many rows
    would show a difference as large as this one in 80 % of tries (Miller 2024, section 5); None if there is none.
    Returns {verdict, metric, base, tuned, difference, ci95, n, p, needed_n, sentence}.
    """
    known = SCORES.get(metric)
    if known is None:
        shares = all(0 <= value <= 1 for values in (base, tuned) for value in values)
        known = (metric, shares, "", "higher")
    name = known[0] if name is None else name
    is_share = known[1] if is_share is None else is_share
    better = known[3] if better is None else better
    found = paired_difference(base, tuned, clusters)
    sure = is_sure(found)
    word = "can't tell" if not sure else "better" if (found["value"] > 0) == (better == "higher") else "worse"
    needed = None if sure else needed_n(np.asarray(tuned, dtype=float) - np.asarray(base, dtype=float), clusters)
    result = {
        "verdict": word,
        "metric": metric,
        "base": float(np.mean(base)),
        "tuned": float(np.mean(tuned)),
        "difference": found["value"],
        "ci95": found["ci95"],
        "n": found["n"],
        "p": found["p"],
        "needed_n": needed,
    }
    return {**result, "sentence": _sentence(result, name, is_share, known[2], row)}


def is_sure(difference: dict) -> bool:
    """Whether a difference that `paired_difference` returned counts: its interval leaves out 0, and p < 0.05."""
    low, high = difference["ci95"]
    return (low > 0 or high < 0) and difference["p"] < 0.05


def needed_n(difference: np.ndarray, clusters: Sequence[Hashable] | None = None) -> int | None:
    """Rows needed to show a mean difference as large as this one; None when there is none. `difference`: (rows,).

    Rows in `clusters` are taken to come in clusters of the same size as now.
    """
    effect = abs(float(difference.mean()))
    if effect == 0:
        return None
    rows = len(difference)
    values = np.stack([difference, np.ones(rows)])
    sums, sizes = _sums_by_cluster(values, range(rows) if clusters is None else clusters)
    units = len(sums)
    errors = (sums - difference.mean() * sizes) * units / rows
    spread = math.sqrt((errors**2).sum() / (units - 1)) if units > 1 else 0.0
    by_power = ((Z95 + Z_POWER) * spread / effect) ** 2
    by_sign = 6 / np.count_nonzero(sums) * units  # fewer than 6 that differ can't reach p < 0.05
    return max(math.ceil(max(by_power, by_sign) * rows / units), rows + 1)


def _sentence(result: dict, name: str, is_share: bool, unit: str, row: str) -> str:
    base, tuned, n = result["base"], result["tuned"], result["n"]
    scale, digits = (100, 1) if is_share else (1, 3)

    def shown(value: float, suffix: str = "") -> str:
        return f"{value * scale:.{digits}f}{suffix}"

    low, high = (shown(bound) for bound in result["ci95"])
    suffix = " %" if is_share else unit
    rows = f"{n:,} {row}{'' if n == 1 else 's'}"
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
    """Row numbers of all bootstrap resamples, in chunks of shape (some, n)."""
    random = np.random.default_rng(SEED)
    at_once = max(1, CHUNK // n)
    for start in range(0, RESAMPLES, at_once):
        yield random.integers(0, n, size=(min(at_once, RESAMPLES - start), n), dtype=np.int32)


def _sums_by_cluster(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Sums of `values` (any, rows) over the rows of each cluster: (any, clusters)."""
    numbers: dict[Hashable, int] = {}
    of_row = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    if len(of_row) != values.shape[1]:
        raise ValueError(f"{values.shape[1]} rows, but clusters of {len(of_row)}")
    return np.stack([np.bincount(of_row, weights=line) for line in values])


def _matched_interval(gained: int, lost: int, n: int) -> list[float]:
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
    # Patterns with the very mean that was seen must count; sums of floats differ in their last bits.
    seen = abs(changed.sum()) * (1 - 1e-9)
    random = np.random.default_rng(SEED)
    at_once = max(1, CHUNK // len(changed))
    extreme = 0
    for start in range(0, RESAMPLES, at_once):
        signs = random.integers(0, 2, size=(min(at_once, RESAMPLES - start), len(changed)), dtype=np.int8)
        extreme += int((np.abs((2.0 * signs - 1) @ changed) >= seen).sum())
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
