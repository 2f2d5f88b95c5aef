"""Base against tuned: held-out scores, fields, tasks, and what a judge said, each difference with its interval."""

import math
from pathlib import Path

import numpy as np

from adder import statistics
from adder.errors import UserError
from adder.files import read_json, read_jsonl

# The held-out scores, in the order in which the report shows them. `kind` says how a value is written: a share or a
# number; `meaning` is for a reader who has never seen the score.
METRICS: dict[str, dict] = {
    "exact_match": {
        "name": "Exact match", "kind": "share", "better": "higher",
        "meaning": "replies that say what their reference says: the same text, or of JSON the same data, of a worked "
        "answer the same number",
    },
    "field_f1": {
        "name": "Field F1", "kind": "share", "better": "higher",
        "meaning": "values inside the JSON: harmonic mean of how many of the given ones are right and how many of the "
        "expected ones were given",
    },
    "json_valid": {
        "name": "Valid JSON", "kind": "share", "better": "higher", "meaning": "replies that are a JSON object at all",
    },
    "rouge_l": {
        "name": "ROUGE-L", "kind": "share", "better": "higher",
        "meaning": "words that reply and reference have in common in the same order (F-measure, mean over replies)",
    },
    "chrf": {
        "name": "chrF", "kind": "share", "better": "higher",
        "meaning": "letter sequences that reply and reference have in common (F2 score, mean over replies)",
    },
    "loss": {
        "name": "Held-out loss", "kind": "number", "better": "lower", "unit": "nats per token",
        "meaning": "how surprised the model is by a token of the references: the mean negative log-likelihood",
    },
    "perplexity": {
        "name": "Perplexity", "kind": "number", "better": "lower", "unit": "",
        "meaning": "the same as a number of equally likely tokens to choose from: e to the power of the loss",
    },
}  # fmt: skip


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
    """Each held-out score of base and tuned with its interval, and their difference, paired by row where possible."""
    base, tuned = facts["evaluate_base"]["heldout"], facts["evaluate_tuned"]["heldout"]
    compared = {}
    for metric in METRICS:
        if metric not in base and metric not in tuned:
            continue
        entry = {"base": shown(base.get(metric)), "tuned": shown(tuned.get(metric)), "difference": None}
        if entry["base"] and entry["tuned"]:
            rows = [per_row(metric, rows) for rows in scored(metric, facts["samples"])]
            entry["difference"] = difference(base[metric], tuned[metric], rows)
        compared[metric] = entry
    return compared


def field_rows(facts: dict) -> dict[str, dict]:
    """Per-field scores of base and tuned by field name; empty where replies are not JSON."""
    fields = [facts[f"evaluate_{who}"]["heldout"].get("fields") or {} for who in ("base", "tuned")]
    names = dict.fromkeys([*fields[1], *fields[0]])
    return {name: {"base": fields[0].get(name), "tuned": fields[1].get(name)} for name in names}


def verdict(facts: dict, heldout: dict) -> dict:
    """The verdict on the main score, as `statistics.verdict` puts it.

    Raises UserError where the evaluations kept neither exact matches nor losses.
    """
    metric = main_metric(heldout)
    base, tuned = (per_row(metric, rows) for rows in scored(metric, facts["samples"]))
    if base is None or tuned is None:
        raise UserError(f"report: the samples of base and tuned must each have {metric} to be compared")
    return statistics.verdict(metric, base, tuned)


def main_metric(heldout: dict) -> str:
    """Exact match where any reply of either model matches its reference, else the loss, which free text has too."""
    exact = heldout.get("exact_match")
    return "exact_match" if exact and any(exact[who] and exact[who]["value"] for who in ("base", "tuned")) else "loss"


def scored(metric: str, samples: list[dict]) -> list[list[dict]]:
    """The samples of base and of tuned that have this score: plain texts have a loss, and no reply to judge."""
    asked = [sample for sample in samples if metric == "loss" or sample["tuned"]["reply"] is not None]
    return [[sample[who] for sample in asked] for who in ("base", "tuned")]


def per_row(metric: str, samples: list[dict]) -> np.ndarray | None:
    """One value a row whose mean is the score (float64), or None where the samples do not tell.

    The loss is a mean over tokens: each row counts as often as it has labelled tokens.
    """
    if metric == "loss" and all(row.get("loss") is not None and row.get("labelled_tokens") for row in samples):
        tokens = np.array([row["labelled_tokens"] for row in samples], dtype=float)
        return np.array([row["loss"] for row in samples], dtype=float) * tokens / tokens.mean()
    if all(isinstance(row.get(metric), int | float) for row in samples):
        return np.array([row[metric] for row in samples], dtype=float)
    return None


def difference(base: dict, tuned: dict, rows: list[np.ndarray | None]) -> dict:
    """Tuned less base as {value, ci95, p}: paired by row, or as if independent where the rows' mean isn't the score.

    `rows`: one value a row of base and of tuned. Without them p is None, without standard errors the interval too.
    """
    value = tuned["value"] - base["value"]
    if all(row is not None and len(row) > 1 for row in rows):
        found = statistics.paired_difference(*rows)
        if math.isclose(found["value"], value, rel_tol=1e-3, abs_tol=1e-6):
            return {name: found[name] for name in ("value", "ci95", "p")}
    errors = [score.get("stderr") for score in (base, tuned)]
    if None in errors:
        return {"value": value, "ci95": None, "p": None}
    half = 1.96 * math.hypot(*errors)
    return {"value": value, "ci95": [value - half, value + half], "p": None}


def is_sure(found: dict | None) -> bool:
    """Whether a difference is more than chance, as `statistics.verdict` has it: only then it gets a colour.

    One that has no p is judged by its interval alone, one without an interval is never sure.
    """
    if not found or not found["ci95"] or None in found["ci95"]:
        return False
    return statistics.is_sure(found | {"p": found.get("p") or 0.0})


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
        values = [per_row(metric, [sample[who] for sample in task["samples"]]) for who in ("base", "tuned")]
        found = difference(base, tuned, values)
        rows.append({
            **entry,
            **{key: scores[key] for key in ("version", "metric", "higher_is_better", "num_fewshot")},
            "base": shown(base),
            "tuned": shown(tuned),
            "difference": found,
            "verdict": word(found, scores["higher_is_better"]),
        })  # fmt: skip
    return rows


def word(found: dict, higher_is_better: bool) -> str:
    """A difference in a word, as `statistics.verdict` has it: "better", "worse" or "can't tell"."""
    if not is_sure(found):
        return "can't tell"
    return "better" if (found["value"] > 0) == higher_is_better else "worse"
