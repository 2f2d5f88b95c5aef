"""Base against tuned: held-out scores, fields, tasks, and what a judge said, each difference with its interval."""

from pathlib import Path

import numpy as np

from adder.core import intervals
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.evaluation.json_fields import count_fields
from adder.evaluation.metrics import SCORES, RatioScore

FIELD_SCORES = ("precision", "recall", "f1")


def paired_samples(base: Path, tuned: Path) -> list[dict]:
    """Join the samples of two evaluations by id, in the tuned model's order: [{id, base, tuned}].

    Raises UserError when they were not made from the same rows: a paired comparison would be meaningless.
    """
    base_rows = {row["id"]: row for row in read_jsonl(base / "samples.jsonl")}
    tuned_rows = {row["id"]: row for row in read_jsonl(tuned / "samples.jsonl")}
    if base_rows.keys() != tuned_rows.keys():
        apart = sorted(base_rows.keys() ^ tuned_rows.keys())
        raise UserError(
            f"report: base ({base}) and tuned ({tuned}) were evaluated on different rows, "
            f"{len(apart)} stand in just one of them, such as {apart[0]}"
        )
    return [{"id": id_, "base": base_rows[id_], "tuned": row} for id_, row in tuned_rows.items()]


def compare(facts: dict) -> dict:
    """Each held-out score of base and tuned with its interval, and their difference, paired by row."""
    base, tuned = facts["evaluate_base"]["heldout"], facts["evaluate_tuned"]["heldout"]
    compared = {}
    for metric in SCORES:
        if metric not in base and metric not in tuned:
            continue
        entry = {"base": shown(base.get(metric)), "tuned": shown(tuned.get(metric)), "difference": None}
        if entry["base"] and entry["tuned"]:
            entry["difference"] = difference(metric, *scored(metric, facts["samples"]))
        compared[metric] = entry
    return compared


def field_rows(facts: dict) -> dict[str, dict]:
    """By field name {base, tuned: its scores, difference: that of each of FIELD_SCORES, or None where one is missing}.

    Empty where replies are not JSON.
    """
    base, tuned = (facts[f"evaluate_{who}"]["heldout"].get("fields") or {} for who in ("base", "tuned"))
    if not tuned:
        return {}
    rows = scored("field_f1", facts["samples"])
    parts = [np.concatenate([field_parts(own, name) for name in tuned], axis=1) for own in rows]
    found = iter(intervals.paired_ratio_differences(*parts, intervals.clusters_of(rows[1])))
    table = {}
    for name, scores in tuned.items():
        changes = {score: told(next(found)) for score in FIELD_SCORES}
        both = {score: None not in (base[name][score], scores[score]) for score in FIELD_SCORES}
        known = {score: change if both[score] else None for score, change in changes.items()}
        table[name] = {"base": base[name], "tuned": scores, "difference": known}
    return table


def verdict(facts: dict, heldout: dict) -> dict:
    """The verdict on the main score, as `statistics.verdict` puts it.

    Raises UserError where the evaluations kept neither exact matches nor losses.
    """
    metric = main_metric(heldout)
    rows = scored(metric, facts["samples"])
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


def main_metric(heldout: dict) -> str:
    """Exact match where any reply of either model matches its reference, else the loss, which free text has too."""
    exact = heldout.get("exact_match")
    return "exact_match" if exact and any(exact[who] and exact[who]["value"] for who in ("base", "tuned")) else "loss"


def scored(metric: str, samples: list[dict]) -> list[list[dict]]:
    """The samples of base and of tuned that have this score: plain texts have a loss, and no reply to judge."""
    score = SCORES[metric]
    of_texts = isinstance(score, RatioScore) and not score.of_replies
    asked = [sample for sample in samples if of_texts or sample["tuned"]["reply"] is not None]
    return [[sample[who] for sample in asked] for who in ("base", "tuned")]


def per_row(metric: str, samples: list[dict]) -> np.ndarray | None:
    """One value a row whose mean is the score (float64), or None where the samples do not tell.

    The loss is a mean over tokens: each row counts as often as it has labelled tokens.
    """
    if metric == "loss":
        losses, tokens = loss_parts(samples)
        return losses / tokens.mean()
    if all(isinstance(row.get(metric), int | float) for row in samples):
        return np.array([row[metric] for row in samples], dtype=float)
    return None


def loss_parts(samples: list[dict]) -> np.ndarray:
    """Each row's loss in nats and its labelled tokens: float64 (2, rows)."""
    tokens = np.array([row["labelled_tokens"] for row in samples], dtype=float)
    return np.stack([np.array([row["loss"] for row in samples], dtype=float) * tokens, tokens])


def field_parts(samples: list[dict], name: str | None = None) -> np.ndarray:
    """Numerators and denominators of FIELD_SCORES, of one field or of all: float64 (2, 3, rows)."""
    fields = [row["fields"] for row in samples]
    own = fields if name is None else [{name: found[name]} if name in found else {} for found in fields]
    right, given, expected = np.array([count_fields(one) for one in own], dtype=float).T
    return np.stack([[right, right, 2 * right], [given, expected, given + expected]])


def difference(metric: str, base: list[dict], tuned: list[dict]) -> dict:
    """Tuned less base in a score, paired by row, as {value, ci95, p}; the samples of each have the same rows."""
    clusters = intervals.clusters_of(tuned)
    if metric == "field_f1":
        parts = (field_parts(rows)[:, FIELD_SCORES.index("f1"), None] for rows in (base, tuned))
        return told(intervals.paired_ratio_differences(*parts, clusters)[0])
    if metric == "perplexity":
        parts = (loss_parts(rows)[:, None] for rows in (base, tuned))
        return told(intervals.paired_ratio_differences(*parts, clusters, np.exp)[0])
    return told(intervals.paired_difference(per_row(metric, base), per_row(metric, tuned), clusters))


def told(found: dict) -> dict:
    """A difference without what only computations need."""
    return {name: found[name] for name in ("value", "ci95", "p")}


def shown(score: dict | None) -> dict | None:
    """A score without what only computations need."""
    return score and {name: score.get(name) for name in ("value", "ci95", "n")}


def read_tasks(inputs: dict[str, Path]) -> list[dict]:
    """The tasks beside the held-out rows, in order: {base, tuned (their scores.json), samples (joined by id)}."""
    found = []
    while f"task_tuned_{len(found)}" in inputs:
        base, tuned = (Path(inputs[f"task_{who}_{len(found)}"]) for who in ("base", "tuned"))
        scores = [read_json(folder / "scores.json") for folder in (base, tuned)]
        found.append({"base": scores[0], "tuned": scores[1], "samples": paired_samples(base, tuned)})
    return found


def compare_tasks(tasks: list[dict], asked: list[dict]) -> list[dict]:
    """Base and tuned on each task by the metric that counts, as metrics.json has it but for the guard's word.

    `asked`: {task, max_drop} of each.
    """
    rows = []
    for entry, task in zip(asked, tasks, strict=True):
        scores, metric = task["tuned"], task["tuned"]["metric"]
        base, tuned = (task[who]["metrics"][metric] for who in ("base", "tuned"))
        values = ([sample[who][metric] for sample in task["samples"]] for who in ("base", "tuned"))
        found = told(intervals.paired_difference(*values))
        rows.append({
            **entry,
            **{key: scores[key] for key in ("version", "metric", "higher_is_better", "num_fewshot")},
            "base": shown(base),
            "tuned": shown(tuned),
            "difference": found,
            "verdict": intervals.word(found, scores["higher_is_better"]),
        })  # fmt: skip
    return rows
