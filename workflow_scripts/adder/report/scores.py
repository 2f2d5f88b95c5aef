"""Base against tuned: held-out scores, fields, tasks, each difference with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from adder.core import intervals
from adder.core.errors import UserError
from adder.core.intervals import Change, Estimate, Verdict, Word
from adder.evaluation.json_fields import FieldScores, count_fields
from adder.evaluation.metrics import SCORES, RatioScore
from adder.evaluation.records import SampleRecord
from adder.report.facts import PairedSample, RunFacts, TaskFacts
from adder.report.stage import TaskLimit

FieldScore = Literal["precision", "recall", "f1"]
FIELD_SCORES: tuple[FieldScore, ...] = ("precision", "recall", "f1")
Values = npt.NDArray[np.float64]


class ShownScore(TypedDict):
    """A score with its 95 % interval over `n` rows."""

    value: float | None
    ci95: list[float] | None
    n: int | None


class Comparison(TypedDict):
    """A held-out score of both models, as far as they have it."""

    base: ShownScore | None
    tuned: ShownScore | None
    difference: Change | None


class ComparedField(TypedDict):
    """A field's scores of both models, and the difference in each of FIELD_SCORES; None where a score is missing."""

    base: FieldScores
    tuned: FieldScores
    difference: dict[str, Change | None]


class TaskComparison(TypedDict):
    """Both models on a task by the metric that counts; max_drop: how far the tuned one may fall, if that is limited."""

    task: str
    max_drop: float | None
    version: Any
    metric: str
    higher_is_better: bool
    num_fewshot: int
    base: ShownScore
    tuned: ShownScore
    difference: Change
    verdict: Word


def compare(facts: RunFacts) -> dict[str, Comparison]:
    """Each held-out score of base and tuned with its interval, and their difference, paired by row."""
    base, tuned = facts.base["heldout"], facts.tuned["heldout"]
    compared: dict[str, Comparison] = {}
    for metric in SCORES:
        if metric not in base and metric not in tuned:
            continue
        entry: Comparison = {"base": shown(base.get(metric)), "tuned": shown(tuned.get(metric)), "difference": None}
        if entry["base"] and entry["tuned"]:
            entry["difference"] = difference(metric, *scored(metric, facts.samples))
        compared[metric] = entry
    return compared


def compare_fields(facts: RunFacts) -> dict[str, ComparedField]:
    """The scores of each field by its name; empty where replies are not JSON."""
    base: dict[str, FieldScores] = facts.base["heldout"].get("fields") or {}
    tuned: dict[str, FieldScores] = facts.tuned["heldout"].get("fields") or {}
    if not tuned:
        return {}
    rows = scored("field_f1", facts.samples)
    base_parts, tuned_parts = (np.concatenate([field_parts(own, name) for name in tuned], axis=1) for own in rows)
    clusters = intervals.clusters_of(rows[1])
    found = iter(intervals.paired_ratio_differences(base_parts, tuned_parts, clusters))
    table: dict[str, ComparedField] = {}
    for name, scores in tuned.items():
        changes = {score: shown_change(next(found)) for score in FIELD_SCORES}
        known: dict[str, Change | None] = {
            score: None if None in (base[name][score], scores[score]) else change for score, change in changes.items()
        }
        table[name] = {"base": base[name], "tuned": scores, "difference": known}
    return table


def verdict(facts: RunFacts, heldout: Mapping[str, Comparison]) -> Verdict:
    """The verdict on the main score.

    Raises UserError where the evaluations kept neither exact matches nor losses.
    """
    metric = main_metric(heldout)
    rows = scored(metric, facts.samples)
    base, tuned = (per_row(metric, own) for own in rows)
    if base is None or tuned is None:
        raise UserError(f"report: the samples of base and tuned must each have {metric} to be compared")
    score = SCORES[metric]
    return intervals.verdict(
        metric,
        base,
        tuned,
        name=score.spoken,
        is_share=score.is_share,
        unit=score.unit,
        better=score.better,
        clusters=intervals.clusters_of(rows[1]),
    )


def main_metric(heldout: Mapping[str, Comparison]) -> str:
    """Exact match where any reply of either model matches its reference, else the loss, which free text has too."""
    exact = heldout.get("exact_match")
    any_right = exact and any(score and score["value"] for score in (exact["base"], exact["tuned"]))
    return "exact_match" if any_right else "loss"


def scored(metric: str, samples: Sequence[PairedSample]) -> tuple[list[SampleRecord], list[SampleRecord]]:
    """The samples of base and of tuned that have this score: plain texts have a loss, and no reply to judge."""
    score = SCORES[metric]
    of_texts = isinstance(score, RatioScore) and not score.of_replies
    asked = [sample for sample in samples if of_texts or sample.tuned["reply"] is not None]
    return [sample.base for sample in asked], [sample.tuned for sample in asked]


def per_row(metric: str, samples: Sequence[SampleRecord]) -> Values | None:
    """One value a row whose mean is the score (float64), or None where the samples do not tell.

    The loss is a mean over tokens: each row counts as often as it has labelled tokens.
    """
    if metric == "loss":
        losses, tokens = loss_parts(samples)
        return losses / tokens.mean()
    values = [row.get(metric) for row in samples]
    if all(isinstance(value, int | float) for value in values):
        return np.array(values, dtype=float)
    return None


def loss_parts(samples: Sequence[SampleRecord]) -> Values:
    """Each row's loss in nats and its labelled tokens: float64 (2, rows)."""
    tokens = np.array([row["labelled_tokens"] for row in samples], dtype=float)
    return np.stack([np.array([row["loss"] for row in samples], dtype=float) * tokens, tokens])


def field_parts(samples: Sequence[SampleRecord], name: str | None = None) -> Values:
    """Numerators and denominators of FIELD_SCORES, of one field or of all: float64 (2, 3, rows)."""
    fields = [row.get("fields", {}) for row in samples]
    own = fields if name is None else [{name: found[name]} if name in found else {} for found in fields]
    right, given, expected = np.array([count_fields(one) for one in own], dtype=float).T
    return np.stack([[right, right, 2 * right], [given, expected, given + expected]])


def difference(metric: str, base: Sequence[SampleRecord], tuned: Sequence[SampleRecord]) -> Change:
    """Tuned less base in a score, paired by row; the samples of each have the same rows."""
    clusters = intervals.clusters_of(tuned)
    if metric == "field_f1":
        parts = [field_parts(rows)[:, FIELD_SCORES.index("f1"), None] for rows in (base, tuned)]
        return shown_change(intervals.paired_ratio_differences(parts[0], parts[1], clusters)[0])
    if metric == "perplexity":
        parts = [loss_parts(rows)[:, None] for rows in (base, tuned)]
        return shown_change(intervals.paired_ratio_differences(parts[0], parts[1], clusters, np.exp)[0])
    values = [per_row(metric, rows) for rows in (base, tuned)]
    assert values[0] is not None and values[1] is not None, f"a model has {metric}, its samples haven't"
    return shown_change(intervals.paired_difference(values[0], values[1], clusters))


def shown_change(found: Mapping[str, Any]) -> Change:
    """A difference without what only computations need."""
    return {"value": found["value"], "ci95": found["ci95"], "p": found["p"]}


def shown(score: Estimate | None) -> ShownScore | None:
    """A score without what only computations need."""
    return score and {"value": score["value"], "ci95": score.get("ci95"), "n": score.get("n")}


def compare_tasks(tasks: Sequence[TaskFacts], asked: Sequence[TaskLimit]) -> list[TaskComparison]:
    """Base and tuned on each task by the metric that counts."""
    rows: list[TaskComparison] = []
    for limit, task in zip(asked, tasks, strict=True):
        metric, higher = task.tuned["metric"], task.tuned["higher_is_better"]
        base, tuned = (own["metrics"][metric] for own in (task.base, task.tuned))
        values = [[one[metric] for one in own] for own in zip(*((s.base, s.tuned) for s in task.samples), strict=True)]
        found = shown_change(intervals.paired_difference(values[0], values[1]))
        rows.append({
            "task": limit.task,
            "max_drop": limit.max_drop,
            "version": task.tuned["version"],
            "metric": metric,
            "higher_is_better": higher,
            "num_fewshot": task.tuned["num_fewshot"],
            "base": {"value": base["value"], "ci95": base.get("ci95"), "n": base["n"]},
            "tuned": {"value": tuned["value"], "ci95": tuned.get("ci95"), "n": tuned["n"]},
            "difference": found,
            "verdict": intervals.word(found, higher),
        })  # fmt: skip
    return rows
