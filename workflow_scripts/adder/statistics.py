"""Error bars and verdicts: intervals for proportions, means and ratios, and the paired comparison of two models.

The practice is that of E. Miller, "Adding Error Bars to Evals", arXiv:2411.00640: two models that answered the same
rows are compared by the differences row by row, which removes what is merely hard or easy about a row.
"""

import math
from collections.abc import Iterator, Sequence

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


def mean(values: Sequence[float]) -> dict:
    """A mean with its bootstrap 95 % interval: {value, ci95, n, stderr}."""
    return ratio(values, np.ones(len(values)))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict:
    """sum(numerators) / sum(denominators) with its bootstrap 95 % interval over rows: {value, ci95, n, stderr}.

    A row is drawn as a whole, so that tokens of one reply, which are alike, don't count as independent (a cluster
    bootstrap). Both arguments have shape (rows,). Raises ValueError without rows; 0 / 0 is 0.
    """
    both = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)])
    n = both.shape[1]
    if n < 1:
        raise ValueError("a ratio of no rows")
    sums = np.concatenate([both[:, rows].sum(-1) for rows in _resamples(n)], axis=1)
    draws = np.divide(sums[0], sums[1], out=np.zeros(sums.shape[1]), where=sums[1] != 0)
    top, bottom = both.sum(-1)
    return {
        "value": float(top / bottom) if bottom else 0.0,
        "ci95": _percentiles(draws),
        "n": n,
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


def paired_difference(base: Sequence[float], tuned: Sequence[float]) -> dict:
    """Mean of tuned - base over the same rows in the same order: {value, ci95, n, stderr, p}.

    The interval is a paired bootstrap's; `p` is two-sided, of the sign-flip test (for scores of 0 and 1 that is
    McNemar's). Raises ValueError when the two don't have the same rows.
    """
    base, tuned = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if base.shape != tuned.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"a paired comparison needs the same rows twice, got {base.shape} and {tuned.shape}")
    difference = tuned - base
    result = mean(difference)
    result["stderr"] = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return {**result, "p": _sign_flip_p(difference)}


def verdict(metric: str, base: Sequence[float], tuned: Sequence[float]) -> dict:
    """Say whether the tuned model is "better", "worse", or one "can't tell".

    `base` and `tuned`: one value a row, in the same order, whose means are the score `metric` (a key of SCORES).
    A difference counts when its 95 % interval leaves out 0 and p < 0.05. Otherwise `needed_n` is about how many rows
    would show a difference as large as this one in 80 % of tries (Miller 2024, section 5); None if there is none.
    Returns {verdict, metric, base, tuned, difference, ci95, n, p, needed_n, sentence}.
    """
    found = paired_difference(base, tuned)
    name, is_share, unit, better = SCORES[metric]
    low, high = found["ci95"]
    sure = (low > 0 or high < 0) and found["p"] < 0.05
    word = "can't tell" if not sure else "better" if (found["value"] > 0) == (better == "higher") else "worse"
    needed = None if sure else needed_n(np.asarray(tuned, dtype=float) - np.asarray(base, dtype=float))
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
    return {**result, "sentence": _sentence(result, name, is_share, unit)}


def needed_n(difference: np.ndarray) -> int | None:
    """Rows needed to show a mean difference as large as this one; None when there is none. `difference`: (rows,)."""
    effect = abs(float(difference.mean()))
    if effect == 0:
        return None
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    by_power = ((Z95 + Z_POWER) * spread / effect) ** 2
    by_sign = 6 / np.count_nonzero(difference) * len(difference)  # fewer than 6 rows that differ can't reach p < 0.05
    return max(math.ceil(max(by_power, by_sign)), len(difference) + 1)


def _sentence(result: dict, name: str, is_share: bool, unit: str) -> str:
    base, tuned, n = result["base"], result["tuned"], result["n"]
    scale, digits = (100, 1) if is_share else (1, 3)

    def shown(value: float, suffix: str = "") -> str:
        return f"{value * scale:.{digits}f}{suffix}"

    low, high = (shown(bound) for bound in result["ci95"])
    suffix = " %" if is_share else unit
    rows = f"{n:,} held-out row{'' if n == 1 else 's'}"
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
        f"about {_round_up(result['needed_n']):,} rows would be needed to show a difference of this size."
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


def _percentiles(draws: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(draws, [2.5, 97.5])]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
