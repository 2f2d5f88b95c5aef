"""What the comparison of runs knows: every run's figures side by side, which is best, and how sure that is.

Runs are compared with the best one over the same held-out rows, row by row where they have the same rows
(E. Miller, "Adding Error Bars to Evals", arXiv:2411.00640). Picking the best one by its score and then testing it
against all others finds differences where there are none: of twelve equally good runs, one is significantly worse than
the luckiest in a sixth of all tries, although each p is multiplied by eleven. So a p is multiplied by the number of
pairs among the runs that are still in question, from the smallest p on, which is Holm's method over all pairs (S. Holm,
Scandinavian Journal of Statistics 6 (1979) 65) with the pairs left out that can't be alike any more (J. P. Shaffer,
Journal of the American Statistical Association 81 (1986) 826). The best of two is tested as it is.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import yaml

from adder.core import intervals
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.evaluation.metrics import SCORES
from adder.report.resolved_settings import RunYaml, SettingRecord
from adder.report.run_metrics import Cost, Finding, GuardWord, Metrics
from adder.report.scores import Comparison as ScoreComparison
from adder.report.scores import RunVerdict, exponential_of, paired, scale_of, sums

# Settings that only say how things are called.
NAMES = ("report.title",)
CURVES = ("loss", "eval_loss")
# libyaml's where PyYAML was built with it: ten times as fast, which a thousand runs notice.
YAML_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RunScore(TypedDict):
    """A score that can be compared: it is a finite number."""

    value: float
    ci95: list[float] | None
    n: int | None


class TaskScore(NamedTuple):
    """The tuned model's score on a task, and what is measured there."""

    value: float | None
    metric: str


class RunCost(NamedTuple):
    """Seconds of all of a run's stages, shared ones counted in full, and their price where one is known."""

    seconds: float
    price: float | None
    currency: str | None


@dataclass(frozen=True)
class HeldOut:
    """A score on held-out rows, in the order of their ids.

    items: (id, digest of the reference) of each. sums: None where rows don't have this score one by one. tokens:
    labelled tokens of each row, where the score is the loss.
    """

    items: list[tuple[str, str]]
    sums: intervals.Sums | None
    tokens: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Score of a run less that of the best run, with its 95 % interval.

    paired: by row, where both have the same rows; else as of two independent samples. comparable: false for losses per
    token where the same replies have other numbers of tokens, which are in different units. needed_n: rows that would
    tell the two apart. p_corrected: for the pairs of runs. matters: it is as large as the smallest one that does. sure:
    that, and p_corrected is below 0.05 and the interval leaves out 0.
    """

    value: float
    ci95: list[float] | None = None
    p: float = 1.0
    paired: bool = False
    comparable: bool = True
    needed_n: int | None = None
    p_corrected: float = 1.0
    matters: bool = True
    sure: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """What one run's stages left for the comparison.

    scores and base: of the tuned model and of the base, by metric. smallest: the smallest difference that matters, by
    metric. verdict: of tuned against base. model: digests of
    the merged model's files. curves: (step, value) by name, a name of CURVES.
    """

    name: str
    scores: dict[str, RunScore]
    base: dict[str, RunScore]
    smallest: dict[str, float]
    verdict: RunVerdict
    tasks: dict[str, TaskScore]
    guard: GuardWord | None
    findings: list[Finding]
    settings: dict[str, SettingRecord]
    cost: RunCost
    steps: int
    model: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]

    @property
    def refused(self) -> bool:
        """Whether the run lost more than it may in a guarded task."""
        return bool(self.guard) and not self.guard["passed"]

    def setting(self, key: str) -> Any:
        """The run's value of a setting; None where it has no such setting."""
        return self.settings[key]["value"] if key in self.settings else None


@dataclass(frozen=True, kw_only=True)
class RankedRun(LoadedRun):
    """A run beside the others: its place, from 1, its score, and how that differs from the best run's."""

    rank: int
    score: RunScore
    against_best: Difference | None


class Recommendation(NamedTuple):
    """Which run to use.

    word: "one" run only; "best", surely better than all others; "can't tell" it from its `rivals`; "refused", where
    every run fell too far in a guarded task. tied: the rivals that score the same, and same_model those of them whose
    merged model is the best's, byte for byte. cheapest: the run that took least time, of the best and its rivals where
    there are any, else of all. needed_n: rows that would tell the best from the first rival, None where that can't be
    said.
    """

    word: Literal["one", "best", "can't tell", "refused"]
    run: str
    rivals: list[str]
    tied: list[str]
    same_model: list[str]
    cheapest: str
    needed_n: int | None


class Differing(NamedTuple):
    """The keys of settings that are not the same in all runs: set by people, and chosen by stages in every run."""

    set: list[str]
    chosen: list[str]


@dataclass(frozen=True)
class Comparison:
    """All runs side by side, the best first.

    metric: the score that decides. paired: None for one run. rows: how many held-out rows, None where runs differ in
    them.
    """

    metric: str
    paired: bool | None
    rows: int | None
    runs: list[RankedRun]
    differing: Differing
    verdict: Recommendation


def compare(runs: Mapping[str, Mapping[str, Path]]) -> Comparison:
    """Compare `runs` (run: {stage: folder}).

    Raises UserError where a file is missing or the runs have no score in common.
    """
    loaded = divided(list(starmap(load, runs.items())))
    metric = main_metric(loaded)
    rows = {name: held_out(metric, folders["evaluate_tuned"] / "samples.jsonl") for name, folders in runs.items()}
    best, *others = rank(loaded, metric)
    first = best.scores[metric]
    found = [
        difference(metric, rows[best.name], rows[run.name], run.scores[metric]["value"] - first["value"])
        for run in others
    ]
    smallest = max(run.smallest[metric] for run in loaded)
    differences = judge_differences(found, smallest)
    ranked = [
        RankedRun(**vars(run), rank=place, score=run.scores[metric], against_best=found)
        for place, (run, found) in enumerate(zip([best, *others], [None, *differences], strict=True), 1)
    ]
    same_rows = all(rows[run.name].items == rows[best.name].items for run in others)
    return Comparison(
        metric=metric,
        paired=all(found.paired for found in differences) if others else None,
        rows=len(rows[best.name].items) if same_rows else None,
        runs=ranked,
        differing=differing(ranked),
        verdict=recommend(ranked),
    )


def load(name: str, folders: Mapping[str, Path]) -> LoadedRun:
    """Read what one run's stages left for the comparison."""
    metrics: Metrics = _read(folders["report"] / "metrics.json", read_json)
    record: RunYaml = _read(
        folders["report"] / "run.yaml", lambda path: yaml.load(path.read_text(encoding="utf-8"), YAML_LOADER)
    )
    curve = _read(folders["train"] / "metrics.jsonl", lambda path: list(read_jsonl(path)))
    merged = _read(folders["merge"] / "stage.json", read_json)["outputs"]
    return LoadedRun(
        name=name,
        scores=_scores(metrics["heldout"], "tuned"),
        base=_scores(metrics["heldout"], "base"),
        smallest={name: found["smallest_difference"] for name, found in metrics["heldout"].items()},
        verdict=metrics["verdict"],
        tasks={task["task"]: TaskScore(task["tuned"]["value"], task["metric"]) for task in metrics["tasks"]},
        guard=metrics["guard"],
        findings=metrics["doctor"],
        settings=record["settings"],
        cost=cost(metrics["cost"]),
        steps=_read(folders["train"] / "train.json", read_json)["steps"],
        model={path: file["digest"] for path, file in merged.items() if path.startswith("model/")},
        curves={key: [(row["step"], row[key]) for row in curve if _number(row.get(key))] for key in CURVES},
    )


def cost(found: Cost) -> RunCost:
    """A run's cost, as its metrics.json has it."""
    price = found["price"]
    return RunCost(found["total_seconds"], price and price["value"], price and price["currency"])


def main_metric(runs: Sequence[LoadedRun]) -> str:
    """The score that decides: one that a run's own verdict is about and that all runs have, the report's first of such.
    Perplexities are not compared: their losses are.

    Raises UserError where the runs have no score in common.
    """
    common = [name for name in SCORES if not exponential_of(name) and all(name in run.scores for run in runs)]
    if not common:
        raise UserError(
            "compare: the runs have no held-out score in common: "
            + "; ".join(f"{run.name} has {', '.join(run.scores) or 'none'}" for run in runs)
        )
    asked = [metric for metric in common if any(run.verdict["metric"] == metric for run in runs)]
    return (asked or common)[0]


def held_out(metric: str, path: Path) -> HeldOut:
    """A run's values of a score (`path`: the tuned model's samples.jsonl). Texts without a reply have just a loss."""
    rows = [row for row in _read(path, lambda path: list(read_jsonl(path))) if metric == "loss" or _replied(row)]
    rows.sort(key=lambda row: row["id"])
    return HeldOut(
        items=[(row["id"], hashlib.blake2b(str(row["reference"]).encode()).hexdigest()) for row in rows],
        sums=sums(metric, rows),
        tokens=[row["labelled_tokens"] for row in rows] if metric == "loss" else None,
    )


def rank(runs: Sequence[LoadedRun], metric: str) -> list[LoadedRun]:
    """The runs, best first; of equals the cheaper one. Runs that fell too far in a guarded task come last."""
    sign = -1 if SCORES[metric].better == "higher" else 1
    return sorted(runs, key=lambda run: (run.refused, sign * run.scores[metric]["value"], run.cost.seconds, run.name))


def difference(metric: str, best: HeldOut, other: HeldOut, value: float) -> Difference:
    """How a run differs from the best; `value` is the difference of their scores, for where rows don't tell."""
    unknown = Difference(value=value)
    if best.sums is None or other.sums is None:
        return unknown
    if best.items != other.items:
        return independent(metric, best.sums, other.sums)
    if best.tokens != other.tokens:
        return replace(unknown, comparable=False)
    found = paired(metric, best.sums, other.sums)
    needed = intervals.needed_n(found)
    return Difference(value=found["value"], ci95=_known(found), p=small_p(found), paired=True, needed_n=needed)


def _known(found: intervals.Difference) -> list[float] | None:
    """A difference's interval, None where it has no ends."""
    return found["ci95"] if all(map(math.isfinite, found["ci95"])) else None


def small_p(found: intervals.Difference) -> float:
    """The p of a paired difference, beyond what drawing signs can show: there the normal distribution's.

    Ten thousand draws have no p below 1e-4, too much to be multiplied by the pairs of many runs.
    """
    floor = 1 / (intervals.SIGN_DRAWS + 1)
    if not math.isclose(found["p"], floor):
        return found["p"]
    return min(floor, normal_p(found["value"], found["stderr"]))


def normal_p(value: float, error: float) -> float:
    """Two-sided p of a value with this standard error."""
    return math.erfc(abs(value) / error / math.sqrt(2)) if error else float(value == 0)


def independent(metric: str, best: intervals.Sums, other: intervals.Sums) -> Difference:
    """Difference of a score on different rows, with its 95 % interval; none from a single row or group."""
    found = intervals.unpaired_difference(best, other, scale_of(metric))
    ci95 = _known(found)
    return Difference(value=found["value"], ci95=ci95, p=found["p"] if ci95 else 1.0)


def judge_differences(differences: Sequence[Difference], smallest: float = 0.0) -> list[Difference]:
    """The differences from the best run, in the same order, with p corrected and a word on which are sure and at least
    the `smallest` that matters.
    """
    judged = list(differences)
    order = sorted(range(len(judged)), key=lambda index: judged[index].p)
    highest = 0.0
    for place, index in enumerate(order):
        one, left = judged[index], len(order) + 1 - place
        highest = max(highest, min(1.0, one.p * left * (left - 1) / 2))
        low, high = one.ci95 or (0.0, 0.0)
        matters = abs(one.value) >= smallest * intervals.SAME
        sure = matters and highest < 0.05 and (low > 0 or high < 0)
        judged[index] = replace(one, p_corrected=highest, matters=matters, sure=sure)
    return judged


def recommend(runs: Sequence[RankedRun]) -> Recommendation:
    """Which of the runs, the best first, to use."""
    best, *others = runs
    against = [(run, run.against_best) for run in others if run.against_best]
    rivals = [(run, found) for run, found in against if not found.sure and not run.refused]
    tied = [run for run, _ in rivals if math.isclose(run.score["value"], best.score["value"], rel_tol=1e-9)]
    # Of runs that took the same time the better one, for they are in order and min takes the first.
    cheapest = min([best, *([run for run, _ in rivals] or others)], key=lambda run: run.cost.seconds)
    return Recommendation(
        word="refused" if best.refused else "one" if not others else "can't tell" if rivals else "best",
        run=best.name,
        rivals=[run.name for run, _ in rivals],
        tied=[run.name for run in tied],
        same_model=[run.name for run in tied if run.model == best.model],
        cheapest=cheapest.name,
        needed_n=rivals[0][1].needed_n if rivals and not tied else None,
    )


def differing(runs: Sequence[LoadedRun]) -> Differing:
    """The keys of settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NAMES)
    found = Differing([], [])
    for key in keys:
        rows = [run.settings.get(key) for run in runs]
        values = [row and row["value"] for row in rows]
        if any(value != values[0] for value in values):
            chosen = all(row is None or row["from"] == "chosen" for row in rows)
            (found.chosen if chosen else found.set).append(key)
    return found


def divided(runs: Sequence[LoadedRun]) -> list[LoadedRun]:
    """The runs with the parts of settings that all have, such as data.sources, as settings of their own, such as
    data.sources.0.path; what one run has more of stays whole.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    made: list[dict[str, SettingRecord]] = [{} for _ in runs]
    for key in keys:
        records = [run.settings.get(key) for run in runs]
        for name, values in _parts(key, [record and record["value"] for record in records]):
            for settings, record, value in zip(made, records, values, strict=True):
                if record is not None:
                    settings[name] = {**record, "value": value}
    return [replace(run, settings=settings) for run, settings in zip(runs, made, strict=True)]


def _parts(key: str, values: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """A setting of all runs by its parts: (key, value in each run); None where a run has no such part."""
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            yield from _parts(f"{key}.{name}", [value.get(name) for value in values])
    elif all(isinstance(value, list) and all(isinstance(item, Mapping) for item in value) for value in values):
        for place in range(max(map(len, values))):
            yield from _parts(f"{key}.{place}", [dict(enumerate(value)).get(place) for value in values])
    else:
        yield key, values


def _scores(heldout: Mapping[str, ScoreComparison], who: Literal["base", "tuned"]) -> dict[str, RunScore]:
    """The scores of base or tuned by metric; one that isn't finite can't be compared."""
    found: dict[str, RunScore] = {}
    for metric in SCORES:
        score = heldout[metric][who] if metric in heldout else None
        if score and (value := score["value"]) is not None:
            found[metric] = {"value": value, "ci95": score["ci95"], "n": score["n"]}
    return found


def _replied(row: Mapping[str, Any]) -> bool:
    return row.get("reply") is not None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path, how: Callable[[Path], Any]) -> Any:
    try:
        return how(path)
    except FileNotFoundError:
        raise UserError(f"compare: {path} is missing; its stage did not finish, or an older version wrote it") from None
