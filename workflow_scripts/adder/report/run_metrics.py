"""`metrics.json`: the figures of a run, for people's own programs. docs/metrics.md describes its keys."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from adder.core.choice import ChoiceRecord
from adder.core.length_summary import LengthSummary
from adder.core.stage_record import StageRecord
from adder.evaluation.records import JudgeRecord
from adder.merging.records import ProofRecord
from adder.packing.records import Truncation
from adder.report import regression_guard, scores
from adder.report.facts import RunFacts
from adder.report.stage import ReportSettings

SCHEMA_VERSION = 2
JOULES_PER_KWH = 3.6e6
# What becomes of a row: one of these.
DATA_CLASSES = (
    *("train", "heldout", "tests", "duplicates", "near_duplicates", "leaked", "left_out", "undesired", "rejected"),
)
# What train.json says that isn't a figure of the training: it has keys of its own, or is for the report alone.
NOT_FIGURES = ("facts", "kept", "preflight")


class GuardWord(TypedDict):
    """Whether the run lost no more than it may, and the tasks in which it did."""

    passed: bool
    failed: list[str]


class TaskMetrics(scores.TaskComparison):
    """A task, and what the guard says of it; None where it isn't guarded."""

    guard: Literal["passed", "failed"] | None


class LengthMetrics(TypedDict):
    """What was decided about lengths, and what it costs."""

    max_seq_length: int
    packing: bool
    tokens: LengthSummary
    dropped: int
    truncation: Truncation
    examples: int | None
    packs: int | None
    examples_per_pack: float | None
    fill: float | None


class Finding(TypedDict):
    """What the doctor found, without its words."""

    name: str
    severity: str
    step: int | None


class StageMetrics(TypedDict):
    """What a stage took."""

    seconds: float
    peak_memory_bytes: int | None
    restored: bool | None
    peak_gpu_memory_bytes: NotRequired[int]
    attempts: NotRequired[int]


class Price(TypedDict):
    """What the run cost, at so much an hour."""

    value: float
    per_hour: float
    currency: str


class Energy(TypedDict):
    """What the stages used that recorded it: parts of the machine that told, price and grams of CO₂ by the factors."""

    joules: float
    stages: dict[str, float]
    parts: dict[str, float]
    price: float | None
    currency: str
    co2_grams: float | None


class Cost(TypedDict):
    """Seconds of each stage and of all; price and energy where they are known."""

    seconds: dict[str, float]
    total_seconds: float
    price: Price | None
    energy: Energy | None


class Metrics(TypedDict):
    """metrics.json."""

    schema_version: int
    run: str
    verdict: scores.RunVerdict
    heldout: dict[str, scores.Comparison]
    fields: dict[str, scores.ComparedField]
    tasks: list[TaskMetrics]
    guard: GuardWord | None
    judge: JudgeRecord | None
    data: dict[str, Any]
    lengths: LengthMetrics
    train: dict[str, Any]
    doctor: list[Finding]
    kept: ChoiceRecord | None
    merge: ProofRecord
    stages: dict[str, StageMetrics]
    cost: Cost


def build_metrics(settings: ReportSettings, facts: RunFacts) -> Metrics:
    """Return what `metrics.json` says; numbers that JSON has no word for (an infinite perplexity) are None."""
    smallest = settings.smallest_difference
    heldout = scores.compare(facts, smallest)
    tasks, guard = guarded_tasks(scores.compare_tasks(facts.tasks, settings.tasks, smallest["task"]))
    lengths = facts.lengths
    metrics: Metrics = {
        "schema_version": SCHEMA_VERSION,
        "run": settings.run,
        "verdict": scores.verdict(facts, heldout),
        "heldout": heldout,
        "fields": scores.compare_fields(facts, smallest["field_f1"]),
        "tasks": tasks,
        "guard": guard,
        "judge": facts.judge,
        "data": data_metrics(facts),
        "lengths": {
            "max_seq_length": lengths["max_seq_length"]["value"],
            "packing": lengths["packing"]["value"],
            "tokens": lengths["tokens"],
            "dropped": lengths["dropped"],
            "truncation": lengths["truncation"],
            "examples": lengths["examples"],
            "packs": lengths["packs"],
            "examples_per_pack": lengths["examples_per_pack"],
            "fill": lengths["fill"],
        },
        "train": {"seconds": facts.records["train"].get("seconds")}
        | {name: value for name, value in facts.train.items() if name not in NOT_FIGURES},
        "doctor": _findings(facts),
        "kept": facts.train.get("kept"),
        "merge": facts.merge,
        "stages": {stage: _took(record) for stage, record in facts.records.items()},
        "cost": cost(settings, facts.records),
    }
    return finite(metrics)


def guarded_tasks(rows: Sequence[scores.TaskComparison]) -> tuple[list[TaskMetrics], GuardWord | None]:
    """The compared tasks with the guard's word for each, and its word on all; None where none is guarded."""
    guarded: list[TaskMetrics] = [{**row, "guard": _guard_word(row)} for row in rows]
    failed = [row["task"] for row in guarded if row["guard"] == "failed"]
    any_guarded = any(row["guard"] for row in guarded)
    return guarded, {"passed": not failed, "failed": failed} if any_guarded else None


def cost(settings: ReportSettings, records: Mapping[str, StageRecord]) -> Cost:
    """Seconds of each stage and of all; their price where an hour has one; their energy where stages recorded it.

    A stage counts as it was computed, also where its result was taken from an equal earlier one.
    """
    seconds = {stage: record["seconds"] for stage, record in records.items()}
    total, hourly = sum(seconds.values()), settings.price_per_hour
    return {
        "seconds": seconds,
        "total_seconds": total,
        "price": None
        if hourly is None
        else {"value": hourly * total / 3600, "per_hour": hourly, "currency": settings.currency},
        "energy": energy(settings, records),
    }


def energy(settings: ReportSettings, records: Mapping[str, StageRecord]) -> Energy | None:
    """What the stages used, as far as their machines told; None where none did."""
    joules = {stage: record["energy_joules"] for stage, record in records.items() if "energy_joules" in record}
    if not joules:
        return None
    parts = dict[str, float]()
    for record in records.values():
        for part, used in record.get("energy_parts", {}).items():
            parts[part] = parts.get(part, 0.0) + used
    kwh = sum(joules.values()) / JOULES_PER_KWH
    return {
        "joules": sum(joules.values()),
        "stages": joules,
        "parts": parts,
        "price": None if settings.price_per_kwh is None else settings.price_per_kwh * kwh,
        "currency": settings.currency,
        "co2_grams": None if settings.co2_per_kwh is None else settings.co2_per_kwh * kwh,
    }


def data_metrics(facts: RunFacts) -> dict[str, Any]:
    """The counts of rows: every row in is in exactly one of DATA_CLASSES; the rest says more of some."""
    card, tokenize = facts.format, facts.tokenize
    near, overlap = card["quality"]["near_duplicates"], card["quality"]["overlap"]
    return {
        **{name: card[name] for name in ("rows_in", "accepted", *DATA_CLASSES, "train_rows", "repeats")},
        **{name: card[name] for name in ("rejects_by_reason", "heldout_in_train")},
        "near_duplicates_found": near["found"],
        "overlap_found": overlap["found"],
        "overlap_dropped": overlap["dropped"],
        "not_tokenized": tokenize["rejected_count"],
        "tokens": {split: counts["tokens"] for split, counts in tokenize["counts"].items()},
        "labelled_tokens": {split: counts["labelled"] for split, counts in tokenize["counts"].items()},
    }


def finite(value: Any) -> Any:
    """The same data with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _guard_word(row: scores.TaskComparison) -> Literal["passed", "failed"] | None:
    if row["max_drop"] is None:
        return None
    return "passed" if regression_guard.check([row])["passed"] else "failed"


def _took(record: StageRecord) -> StageMetrics:
    found: StageMetrics = {
        "seconds": record["seconds"],
        "peak_memory_bytes": record.get("peak_memory_bytes"),
        "restored": record.get("restored"),
    }
    if gpu := record.get("peak_gpu_memory_bytes"):
        found["peak_gpu_memory_bytes"] = gpu
    if attempts := record.get("attempts"):
        found["attempts"] = attempts
    return found


def _findings(facts: RunFacts) -> list[Finding]:
    """The doctor's findings without their words."""
    return [{"name": one["name"], "severity": one["severity"], "step": one["step"]} for one in facts.diagnoses]
