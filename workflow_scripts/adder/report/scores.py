"""Base against tuned: held-out scores, fields, tasks, each difference with its interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from adder.core import intervals
from adder.core.errors import UserError
from adder.core.intervals import Change, Estimate, Sums, Verdict, Word
from adder.evaluation.json_fields import FieldScores, count_fields
from adder.evaluation.metrics import SCORES, RatioScore, ReplyScore
from adder.evaluation.records import SampleRecord
from adder.report.doubts import Doubt
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
    """A held-out score of both models, as far as they have it, and whether the tuned one is better; None without both.

    smallest_difference: below which a difference doesn't matter, in the score's own unit.
    """

    base: ShownScore | None
    tuned: ShownScore | None
    difference: Change | None
    smallest_difference: float
    verdict: Word | None


class ComparedField(TypedDict):
    """A field's scores of both models, and the difference in each of FIELD_SCORES; None where a score is missing.

    verdict: of each difference, by the smallest that matters in a field F1.
    """

    base: FieldScores
    tuned: FieldScores
    difference: dict[str, Change | None]
    verdict: dict[str, Word]


class RunVerdict(Verdict):
    """The verdict on a run; doubts: what stands against a "better", or, where `verdict` is "can't tell", forbids it."""

    doubts: list[str]


class TaskComparison(TypedDict):
    """Both models on a task by the metric that counts; max_drop: how far the tuned one may fall, if that is limited.

    smallest_difference: below which a difference doesn't matter; 0 for what is no share.
    """

    task: str
    max_drop: float | None
    version: Any
    metric: str
    higher_is_better: bool
    num_fewshot: int
    base: ShownScore
    tuned: ShownScore
    difference: Change
    smallest_difference: float
    verdict: Word


def compare(facts: RunFacts, smallest: Mapping[str, float]) -> dict[str, Comparison]:
    """Each held-out score of base and tuned with its interval, and their difference, paired by row.

    `smallest`: the smallest difference that matters, by score. Of a perplexity it is what the loss's comes to.
    """
    base, tuned = facts.base["heldout"], facts.tuned["heldout"]
    compared: dict[str, Comparison] = {}
    for metric in SCORES:
        if metric not in base and metric not in tuned:
            continue
        entry: Comparison = {
            "base": shown(base.get(metric)),
            "tuned": shown(tuned.get(metric)),
            "difference": None,
            "smallest_difference": smallest.get(metric, 0.0),
            "verdict": None,
        }
        if entry["base"] and entry["tuned"]:
            entry["difference"] = difference(metric, *scored(metric, facts.samples))
            of = exponential_of(metric)
            if of and entry["base"]["value"]:
                entry["smallest_difference"] = entry["base"]["value"] * math.expm1(smallest[of])
            # Better or worse is one word for a score and for its exponential.
            known = compared[of]["verdict"] if of in compared else None
            higher = SCORES[metric].better == "higher"
            word = intervals.word(entry["difference"], higher, entry["smallest_difference"])
            entry["verdict"] = known or withheld(word, facts.doubts)
        compared[metric] = entry
    return compared


def compare_fields(facts: RunFacts, smallest: float) -> dict[str, ComparedField]:
    """The scores of each field by its name; empty where replies are not JSON. `smallest` difference that matters."""
    base: dict[str, FieldScores] = facts.base["heldout"].get("fields") or {}
    tuned: dict[str, FieldScores] = facts.tuned["heldout"].get("fields") or {}
    if not tuned:
        return {}
    rows = scored("field_f1", facts.samples)
    base_parts, tuned_parts = (np.concatenate([field_parts(own, name) for name in tuned], axis=1) for own in rows)
    clusters = intervals.clusters_of(rows[1])
    found = iter(intervals.paired_ratio_differences(base_parts, tuned_parts, clusters, scale="share"))
    table: dict[str, ComparedField] = {}
    for name, scores in tuned.items():
        changes = {score: shown_change(next(found)) for score in FIELD_SCORES}
        known: dict[str, Change | None] = {
            score: None if None in (base[name][score], scores[score]) else change for score, change in changes.items()
        }
        words: dict[str, Word] = {
            score: withheld(intervals.word(change, True, smallest), facts.doubts) for score, change in known.items()
        }
        table[name] = {"base": base[name], "tuned": scores, "difference": known, "verdict": words}
    return table


def verdict(facts: RunFacts, heldout: Mapping[str, Comparison]) -> RunVerdict:
    """The verdict on the main score, with what the doctor and the data have against it.

    Raises UserError where the evaluations kept neither exact matches nor losses.
    """
    metric = main_metric(heldout)
    rows = scored(metric, facts.samples)
    base, tuned = (per_row(metric, own) for own in rows)
    if base is None or tuned is None:
        raise UserError(f"report: the samples of base and tuned must each have {metric} to be compared")
    score = SCORES[metric]
    found = intervals.verdict(
        metric,
        base,
        tuned,
        weights=loss_parts(rows[1])[1] if metric == "loss" else None,
        smallest=heldout[metric]["smallest_difference"],
        name=score.spoken,
        is_share=score.is_share,
        unit=score.unit,
        better=score.better,
        clusters=intervals.clusters_of(rows[1]),
    )
    return with_doubts(found, facts.doubts)


def withheld(word: Word, doubts: Sequence[Doubt]) -> Word:
    """The word on one score: no "better" where a doubt forbids it of the run."""
    return "can't tell" if word == "better" and any(doubt.forbids for doubt in doubts) else word


def with_doubts(found: Verdict, doubts: Sequence[Doubt]) -> RunVerdict:
    """The verdict with the doubts in its sentence; "better" is withheld where one of them forbids it."""
    texts = [doubt.text for doubt in doubts]
    if found["verdict"] != "better" or not doubts:
        return {**found, "doubts": texts}
    said = found["sentence"].removeprefix("The tuned model is better than its base: ").rstrip(".")
    if forbidding := [doubt.text for doubt in doubts if doubt.forbids]:
        sentence = f"Can't tell whether the tuned model is better than its base: {said}. But {'; '.join(forbidding)}."
        return {**found, "verdict": "can't tell", "sentence": sentence, "doubts": texts}
    return {**found, "sentence": f"{found['sentence']} To be read with care: {'; '.join(texts)}.", "doubts": texts}


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
    """One value a row (float64), or None where the samples do not tell. Their mean is the score, of the loss the mean
    over tokens: each row counts as often as it has labelled tokens.
    """
    values = [row.get(metric) for row in samples]
    if all(isinstance(value, int | float) for value in values):
        return np.array(values, dtype=float)
    return None


def loss_parts(samples: Sequence[SampleRecord]) -> Values:
    """Each row's loss in nats and its labelled tokens: float64 (2, rows)."""
    tokens = np.array([row["labelled_tokens"] for row in samples], dtype=float)
    return np.stack([np.array([row["loss"] for row in samples], dtype=float) * tokens, tokens])


def exponential_of(metric: str) -> str | None:
    """The score that this one is e to the power of."""
    score = SCORES[metric]
    return score.exponential_of if isinstance(score, RatioScore) else None


def sums(metric: str, samples: Sequence[SampleRecord]) -> Sums | None:
    """The score as a sum over rows by another one; None where the samples do not tell, row by row."""
    clusters = intervals.clusters_of(samples)
    if metric in ("loss", "perplexity"):
        losses, tokens = loss_parts(samples)
        return Sums(losses, tokens, clusters)
    if metric == "field_f1":
        right, both = field_parts(samples)[:, FIELD_SCORES.index("f1")]
        return Sums(right, both, clusters)
    values = per_row(metric, samples)
    return None if values is None else Sums(values, np.ones(len(values)), clusters)


def scale_of(metric: str) -> intervals.Scale:
    """Where a held-out score lies: of a share from 0 to 1, else above 0."""
    return "share" if SCORES[metric].is_share else "positive"


def field_parts(samples: Sequence[SampleRecord], name: str | None = None) -> Values:
    """Numerators and denominators of FIELD_SCORES, of one field or of all: float64 (2, 3, rows)."""
    fields = [row.get("fields", {}) for row in samples]
    own = fields if name is None else [{name: found[name]} if name in found else {} for found in fields]
    right, given, expected = np.array([count_fields(one) for one in own], dtype=float).T
    return np.stack([[right, right, 2 * right], [given, expected, given + expected]])


def difference(metric: str, base: Sequence[SampleRecord], tuned: Sequence[SampleRecord]) -> Change:
    """Tuned less base in a score, paired by row; the samples of each have the same rows."""
    found = [sums(metric, rows) for rows in (base, tuned)]
    assert found[0] is not None and found[1] is not None, f"a model has {metric}, its samples haven't"
    return shown_change(paired(metric, found[0], found[1]))


def paired(metric: str, base: Sums, tuned: Sums) -> intervals.Difference:
    """Tuned less base in a score of the same rows."""
    if isinstance(SCORES[metric], ReplyScore):
        return intervals.paired_difference(base.tops, tuned.tops, tuned.clusters)
    parts = [np.stack([own.tops, own.bottoms])[:, None] for own in (base, tuned)]
    transform = np.exp if exponential_of(metric) else np.positive
    return intervals.paired_ratio_differences(
        parts[0], parts[1], tuned.clusters, transform, scale=scale_of(metric)
    )[0]  # fmt: skip


def shown_change(found: Mapping[str, Any]) -> Change:
    """A difference without what only computations need."""
    return {"value": found["value"], "ci95": found["ci95"], "p": found["p"]}


def shown(score: Estimate | None) -> ShownScore | None:
    """A score without what only computations need."""
    return score and {"value": score["value"], "ci95": score.get("ci95"), "n": score.get("n")}


def compare_tasks(
    tasks: Sequence[TaskFacts], asked: Sequence[TaskLimit], smallest: float = 0.0
) -> list[TaskComparison]:
    """Base and tuned on each task by the metric that counts; `smallest`: the smallest difference of a share that
    matters.
    """
    rows: list[TaskComparison] = []
    for limit, task in zip(asked, tasks, strict=True):
        metric, higher = task.tuned["metric"], task.tuned["higher_is_better"]
        base, tuned = (own["metrics"][metric] for own in (task.base, task.tuned))
        values = [[one[metric] for one in own] for own in zip(*((s.base, s.tuned) for s in task.samples), strict=True)]
        found = shown_change(intervals.paired_difference(values[0], values[1]))
        shares = all(0 <= value <= 1 for own in values for value in own)
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
            "smallest_difference": smallest if shares else 0.0,
            "verdict": intervals.word(found, higher, smallest if shares else 0.0),
        })  # fmt: skip
    return rows
