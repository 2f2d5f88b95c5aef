"""How often the report's intervals hold the truth, and how often equal models are told apart: simulations.

    python benchmarks/intervals.py [--draws 4000] [--only NAME] [--sizes 20 50] [--out FILE]

Each arm draws a true score and held-out rows anew for each draw, asks `adder.core.intervals` for the interval that the
report would print, and counts how often that holds the truth. Rows come by themselves or in clusters of 1 to about 8
that are alike; `n` counts what is independent of one another: rows, or clusters. The arms under `verdict` draw two
models that are equally good and count what is said of them, with the smallest difference that matters as the report
has it.

`coverage` and `verdict` are functions, so that the tests run a short form with fixed seeds.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from adder.core import intervals
from adder.core.intervals import Sums
from adder.evaluation.metrics import SCORES

SIZES = (5, 12, 20, 50, 200, 2000)
TOKENS, TOKEN_SPREAD = 40.0, 0.6  # of a reply: the median, and the standard deviation of the logarithm
Numbers = NDArray[np.float64]
Drawn = TypeVar("Drawn", bound=NDArray[np.generic])
Clusters = NDArray[np.int64] | None
Ends = tuple[float, float]
Arm = Callable[[np.random.Generator, int, bool], tuple[Ends, float]]
Draw = Callable[[np.random.Generator, int, float, Clusters], tuple[Numbers, Numbers]]


class Row(TypedDict):
    """An arm at one number of rows: shares of draws. above and below: of intervals that lie wholly on that side."""

    interval: str
    clustered: bool
    n: int
    draws: int
    coverage: float
    above: float
    below: float
    width: float


class Said(TypedDict):
    """What is said of equal models: shares of draws."""

    metric: str
    clustered: bool
    n: int
    draws: int
    better: float
    worse: float
    no_difference: float


# ---- rows


def drawn(random: np.random.Generator, n: int, clustered: bool) -> tuple[int, Clusters]:
    """How many rows n of them are, and the cluster of each: n clusters have 1 and more rows each, about 4."""
    if not clustered:
        return n, None
    clusters = np.repeat(np.arange(n), 1 + random.poisson(3, n))
    return len(clusters), clusters


def alike(values: Drawn, clusters: Clusters) -> Drawn:
    """One value a row, that of its cluster where there are such."""
    return values if clusters is None else cast(Drawn, values[clusters])


def skills(random: np.random.Generator, n: int, mean: float, clusters: Clusters) -> Numbers:
    """The chance of each row to come out right: beta of this mean, of a cluster's rows near to one another."""
    return alike(random.beta(2 * mean, 2 * (1 - mean), n), clusters)


def tokens_of(random: np.random.Generator, n: int) -> Numbers:
    """Labelled tokens of n replies."""
    return np.ceil(TOKENS * np.exp(TOKEN_SPREAD * random.normal(size=n)))


def losses_of(random: np.random.Generator, n: int, mean: float, clusters: Clusters) -> Numbers:
    """Nats a token of n replies: gamma with a standard deviation of half the mean; of a cluster's rows alike."""
    own = random.gamma(8, 1 / 8, n)
    return mean * own * alike(random.gamma(8, 1 / 8, n), clusters)


def values_of(random: np.random.Generator, n: int) -> NDArray[np.int64]:
    """How many values the JSON of each reference has."""
    return random.integers(2, 7, n)


def rights(random: np.random.Generator, n: int, mean: float, clusters: Clusters) -> tuple[Numbers, Numbers]:
    """Right (1) and wrong (0) of n replies, of which `mean` are right; and ones."""
    chance = random.random(n)
    return (chance < (mean if clusters is None else skills(random, n, mean, clusters))).astype(float), np.ones(n)


def shares(random: np.random.Generator, n: int, mean: float, clusters: Clusters) -> tuple[Numbers, Numbers]:
    """Shares of n replies, with a mean of clipped_mean(mean); and ones."""
    middle = np.clip(skills(random, n, mean, clusters), 0.01, 0.99)
    return random.beta(4 * middle, 4 * (1 - middle)), np.ones(n)


def nats(random: np.random.Generator, n: int, mean: float, clusters: Clusters) -> tuple[Numbers, Numbers]:
    """Nats and tokens of n replies, with `mean` nats a token."""
    losses, tokens = losses_of(random, n, mean, clusters), tokens_of(random, n)
    return losses * tokens, tokens


def fields(random: np.random.Generator, n: int, mean: float, clusters: Clusters) -> tuple[Numbers, Numbers]:
    """Twice the right values and twice the values of n replies, of which `mean` are right."""
    given = values_of(random, n)
    right = random.binomial(given, skills(random, n, mean, clusters))
    return 2 * right.astype(np.float64), 2 * given.astype(np.float64)


# ---- single scores


def exact_match(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    truth, (n, groups) = random.uniform(0.05, 0.95), drawn(random, n, clustered)
    right, _ = rights(random, n, truth, groups)
    return ends(intervals.proportion(right, groups_or_none(groups))), truth


def rouge(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    truth, (n, groups) = random.uniform(0.1, 0.9), drawn(random, n, clustered)
    values, _ = shares(random, n, truth, groups)
    return ends(intervals.mean(values, groups_or_none(groups), "share")), clipped_mean(truth)


def loss(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    truth, (n, groups) = random.uniform(0.1, 3.0), drawn(random, n, clustered)
    return ends(intervals.ratio(*nats(random, n, truth, groups), groups_or_none(groups), "positive")), truth


def perplexity(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    truth, (n, groups) = random.uniform(0.1, 3.0), drawn(random, n, clustered)
    found = intervals.ratio(*nats(random, n, truth, groups), groups_or_none(groups), "positive")
    return ends(intervals.perplexity(found)), math.exp(truth)


def field_f1(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    truth, (n, groups) = random.uniform(0.1, 0.9), drawn(random, n, clustered)
    return ends(intervals.ratio(*fields(random, n, truth, groups), groups_or_none(groups), "share")), truth


def merge_gap(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    """The gap between two merges of one adapter, a difference of losses a token."""
    truth, (n, groups) = random.normal(0, 0.01), drawn(random, n, clustered)
    tokens = tokens_of(random, n)
    gaps = truth + 0.02 * (random.normal(size=n) + alike(random.normal(size=n), groups))
    return ends(intervals.ratio(gaps * tokens, tokens, groups_or_none(groups))), truth


# ---- two models on the same rows


def paired_exact_match(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    base, tuned, truth, groups = answers(random, n, clustered, random.uniform(0, 0.4))
    return ends(intervals.paired_difference(base, tuned, groups)), truth


def answers(
    random: np.random.Generator, n: int, clustered: bool, gain: float
) -> tuple[Numbers, Numbers, float, Sequence[int] | None]:
    """Right and wrong of two models, the true difference of their chances, and the rows' clusters.

    A row's luck decides for both models or, in a third of the rows, for each alone.
    """
    n, groups = drawn(random, n, clustered)
    chance = random.uniform(0.1, 0.9 - gain)
    luck, own = (alike(random.random(n), groups) for _ in range(2))
    if clustered:  # rows of a cluster are alike, not equal
        luck, own = (np.where(random.random(n) < 0.7, one, random.random(n)) for one in (luck, own))
    apart = alike(random.random(n) < 0.33, groups)
    base, tuned = luck < chance, np.where(apart, own, luck) < chance + gain
    return base.astype(float), tuned.astype(float), gain, groups_or_none(groups)


def judged(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    """A judge's win rate: wins, losses and ties of pairs."""
    (n, groups), tie = drawn(random, n, clustered), random.uniform(0.1, 0.5)
    win = random.uniform(0.1, 0.9)
    luck = alike(random.random(n), groups)
    if clustered:
        luck = np.where(random.random(n) < 0.7, luck, random.random(n))
    decided = random.random(n) >= tie
    found = intervals.paired_difference(
        (decided & (luck >= win)).astype(float), (decided & (luck < win)).astype(float), groups_or_none(groups)
    )
    low, high = found["ci95"]
    return (0.5 + low / 2, 0.5 + high / 2), 0.5 + (1 - tie) * (2 * win - 1) / 2


def paired_rouge(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    (n, groups), gain = drawn(random, n, clustered), random.uniform(0, 0.5)
    base = random.beta(2, 2, n)
    part = gain * 2 * random.beta(2, 2, n) * alike(random.random(n) < 0.8, groups)  # of what was left to gain
    loss = 0.2 * random.random(n)
    tuned = (base + (1 - base) * part) * (1 - loss)
    first = 0.5 + 0.5 * 0.8 * gain
    return ends(intervals.paired_difference(base, tuned, groups_or_none(groups))), first * 0.9 - 0.5


def paired_loss(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    base, tuned, tokens, truth, groups = two_losses(random, n, clustered, random.uniform(0.1, 1.1))
    return ends(difference(base, tuned, tokens, groups)), truth


def two_losses(
    random: np.random.Generator, n: int, clustered: bool, factor: float
) -> tuple[Numbers, Numbers, Numbers, float, Sequence[int] | None]:
    """Nats a token of two models, of the second about `factor` times as many; tokens, and the true difference."""
    (n, groups), mean = drawn(random, n, clustered), random.uniform(0.3, 3.0)
    base = losses_of(random, n, mean, groups)
    tuned = base * factor * random.gamma(16, 1 / 16, n) * alike(random.gamma(16, 1 / 16, n), groups)
    return base, tuned, tokens_of(random, n), mean * (factor - 1), groups_or_none(groups)


def difference(
    base: Numbers, tuned: Numbers, tokens: Numbers, groups: Sequence[int] | None, exp: bool = False
) -> intervals.Difference:
    parts = [np.stack([own * tokens, tokens])[:, None] for own in (base, tuned)]
    transform = np.exp if exp else np.positive
    return intervals.paired_ratio_differences(parts[0], parts[1], groups, transform, scale="positive")[0]


def paired_perplexity(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    factor = random.uniform(0.1, 1.1)
    base, tuned, tokens, gap, groups = two_losses(random, n, clustered, factor)
    mean = gap / (factor - 1)
    truth = math.exp(mean * factor) - math.exp(mean)
    return ends(difference(base, tuned, tokens, groups, exp=True)), truth


def paired_f1(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
    (n, groups), gain = drawn(random, n, clustered), random.uniform(0, 0.6)
    given, level = values_of(random, n), random.uniform(0.2, 0.8)
    easy = skills(random, n, level, groups)
    right = random.binomial(given, easy)
    more = right + random.binomial(given - right, gain * alike(random.random(n) < 0.7, groups))
    lost = random.binomial(more, 0.1)
    truth = 0.9 * (level + (1 - level) * gain * 0.7) - level
    parts = [np.stack([2.0 * own, 2.0 * given])[:, None] for own in (right, more - lost)]
    return ends(intervals.paired_ratio_differences(parts[0], parts[1], groups_or_none(groups), scale="share")[0]), truth


# ---- two models on different rows


def unpaired(draw: Draw, truths: Ends, scale: intervals.Scale, mean: Callable[[float], float] = float) -> Arm:
    """The arm of two models whose scores are between `truths`, or are the `mean` of what is."""

    def arm(random: np.random.Generator, n: int, clustered: bool) -> tuple[Ends, float]:
        two, made = random.uniform(*truths, 2), list[Sums]()
        for truth in two:
            rows, groups = drawn(random, n, clustered)
            made.append(Sums(*draw(random, rows, truth, groups), groups_or_none(groups)))
        first, second = map(mean, two)
        return ends(intervals.unpaired_difference(made[0], made[1], scale)), second - first

    return arm


# ---- counting


def ends(found: intervals.Estimate) -> Ends:
    """Both ends of an interval."""
    low, high = found["ci95"]
    return low, high


def groups_or_none(clusters: Clusters) -> Sequence[int] | None:
    """Clusters as `intervals` takes them."""
    return None if clusters is None else clusters.tolist()


@cache
def _middle_means() -> tuple[Numbers, Numbers]:
    """Means of a beta distribution of this mean whose values are kept within 0.01 and 0.99, at a hundred places."""
    from scipy.stats import beta

    at, places = np.linspace(0.1, 0.9, 81), np.linspace(0.01, 0.99, 4001)
    # The mean of what is kept within two ends: the lower end, and the chance to be above each place between.
    return at, np.array([0.01 + np.trapezoid(beta.sf(places, 2 * m, 2 * (1 - m)), places) for m in at])


def clipped_mean(mean: float) -> float:
    """The mean of `skills` of this mean, kept within 0.01 and 0.99."""
    return float(np.interp(mean, *_middle_means()))


ARMS: dict[str, Arm] = {
    "exact match": exact_match,
    "ROUGE-L, chrF, a task's mean": rouge,
    "loss": loss,
    "perplexity": perplexity,
    "field F1, precision, recall": field_f1,
    "gap between merges": merge_gap,
    "judge's win rate": judged,
    "paired exact match": paired_exact_match,
    "paired ROUGE-L, chrF, a task's mean": paired_rouge,
    "paired loss": paired_loss,
    "paired perplexity": paired_perplexity,
    "paired field F1, precision, recall": paired_f1,
    "unpaired exact match": unpaired(rights, (0.1, 0.9), "share"),
    "unpaired ROUGE-L, chrF": unpaired(shares, (0.1, 0.9), "share", clipped_mean),
    "unpaired loss": unpaired(nats, (0.3, 3.0), "positive"),
    "unpaired field F1": unpaired(fields, (0.1, 0.9), "share"),
}


def coverage(name: str, n: int, clustered: bool, draws: int, seed: int = 0) -> Row:
    """How often the interval of an arm holds the truth, at n rows."""
    random, arm = np.random.default_rng([seed, n, clustered, list(ARMS).index(name)]), ARMS[name]
    above = below = 0
    widths: list[float] = []
    for _ in range(draws):
        (low, high), truth = arm(random, n, clustered)
        above += low > truth
        below += high < truth
        widths.append(high - low)
    return {
        "interval": name,
        "clustered": clustered,
        "n": n,
        "draws": draws,
        "coverage": round(1 - (above + below) / draws, 4),
        "above": round(above / draws, 4),
        "below": round(below / draws, 4),
        "width": round(float(np.median(widths)), 4),
    }


def verdict(metric: str, n: int, clustered: bool, draws: int, seed: int = 0) -> Said:
    """What is said of two models that are equally good: each row's two values are dealt to them by chance."""
    random, score, said = np.random.default_rng([seed, n, clustered, len(metric)]), SCORES[metric], Counter[str]()
    for _ in range(draws):
        weights: Numbers | None = None
        if metric == "loss":
            one, other, weights, _, groups = two_losses(random, n, clustered, 1.0)
        else:
            one, other, _, groups = answers(random, n, clustered, 0.0)
        swap = random.random(len(one)) < 0.5 if groups is None else (random.random(n) < 0.5)[np.asarray(groups)]
        base, tuned = np.where(swap, other, one), np.where(swap, one, other)
        found = intervals.verdict(
            metric, base, tuned, weights=weights, smallest=score.smallest_difference, better=score.better,
            is_share=score.is_share, clusters=groups,
        )  # fmt: skip
        said[found["verdict"]] += 1
    return {
        "metric": metric,
        "clustered": clustered,
        "n": n,
        "draws": draws,
        "better": round(said["better"] / draws, 4),
        "worse": round(said["worse"] / draws, 4),
        "no_difference": round(said["no difference"] / draws, 4),
    }


def reuse_signs() -> None:
    """Draw the signs of the sign-flip test once for each number of rows: they are the same each time."""
    kept: dict[tuple[int, int], list[Numbers]] = {}
    draw = intervals._signs

    def signs(n: int) -> list[Numbers]:
        asked = (intervals.SIGN_DRAWS, n)
        if asked not in kept:
            if len(kept) > 100:
                kept.clear()
            kept[asked] = list(draw(n))
        return kept[asked]

    intervals._signs = signs  # pyright: ignore[reportAttributeAccessIssue] - a list is an iterator enough here


def main() -> None:
    """Run the arms and write their figures beside those of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, help="of each arm")
    parser.add_argument("--only", default="", help="arms whose name has this, such as 'paired loss' or 'verdict'")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows or clusters")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "intervals.json")
    asked = parser.parse_args()
    record: dict[str, Any] = {"nominal": 0.95, "coverage": [], "verdict": []}
    if asked.out.exists():
        record = json.loads(asked.out.read_text(encoding="utf-8"))
    reuse_signs()
    arms = [("coverage", name) for name in ARMS] + [("verdict", metric) for metric in ("exact_match", "loss")]
    for what, name in arms:
        if asked.only not in (name if what == "coverage" else f"verdict {name}"):
            continue
        intervals.SIGN_DRAWS = 10 if what == "coverage" else 2_000  # an interval needs no p; of a p, 0.04 must be told
        key, count = ("interval", coverage) if what == "coverage" else ("metric", verdict)
        start = time.time()
        found = [count(name, n, clustered, asked.draws) for clustered in (False, True) for n in asked.sizes]
        made = {(row["clustered"], row["n"]): row for row in [row for row in record[what] if row[key] == name] + found}
        record[what] = [row for row in record[what] if row[key] != name] + [made[place] for place in sorted(made)]
        asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{what} {name}: {time.time() - start:.0f} s", flush=True)
        for row in found:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
