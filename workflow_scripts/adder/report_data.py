"""What the report knows: the stage folders as one plain dictionary, `metrics.json` and `run.yaml` made of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from adder import statistics
from adder.errors import UserError
from adder.files import read_json, read_jsonl

SCHEMA_VERSION = 1
STAGES = (
    "model", "data", "format", "tokenize", "lengths", "train", "merge", "evaluate_base", "evaluate_tuned",
)  # fmt: skip
# What each stage writes that the report shows: one JSON file a stage, and where they lie.
FACTS = {
    "model": "source.json",
    "data": "sources.json",
    "format": "card.json",
    "tokenize": "tokenize.json",
    "lengths": "lengths.json",
    "train": "train.json",
    "merge": "proof.json",
    "evaluate_base": "scores.json",
    "evaluate_tuned": "scores.json",
}
# The scores, in the order in which the report shows them. `kind` says how a value is written: a share or a number.
METRICS: dict[str, dict] = {
    "exact_match": {"name": "Exact match", "kind": "share", "better": "higher"},
    "field_f1": {"name": "Field F1", "kind": "share", "better": "higher"},
    "json_valid": {"name": "Valid JSON", "kind": "share", "better": "higher"},
    "loss": {"name": "Held-out loss", "kind": "number", "better": "lower", "unit": "nats per token"},
    "perplexity": {"name": "Perplexity", "kind": "number", "better": "lower", "unit": ""},
}
# What becomes of a row: one of these.
DATA_CLASSES = ("train", "heldout", "tests", "duplicates", "near_duplicates", "leaked", "left_out", "rejected")
# What train.json says in words, for people: not figures.
TRAIN_TEXTS = ("advice", "diagnoses", "kept", "preflight")
# Choices whose name in a stage's file is a setting of this section.
CHOICE_SECTIONS = {"lengths": "lengths", "train": "train", "merge": "merge", "evaluate_tuned": "evaluate"}


def load(inputs: dict[str, Path]) -> dict[str, Any]:
    """Read all stage folders: {stage: its facts}, and `records`, `plan`, `curve`, `sampled` (replies while training),
    `samples` (of the evaluations), `rejects`, `paths`.

    Raises UserError where a stage or one of its files is missing.
    """
    missing = [stage for stage in STAGES if stage not in inputs]
    if missing:
        raise UserError(f"report: no folder given for {', '.join(missing)}; it needs {', '.join(STAGES)}")
    folders = {stage: Path(inputs[stage]) for stage in STAGES}
    facts: dict[str, Any] = {stage: _read(folders[stage] / FACTS[stage]) for stage in STAGES}
    facts["records"] = {stage: _read(folders[stage] / "stage.json") for stage in STAGES}
    facts["paths"] = {stage: folder.as_posix() for stage, folder in folders.items()}
    facts["plan"] = _read(folders["train"] / "plan.json")
    facts["curve"] = list(read_jsonl(folders["train"] / "metrics.jsonl"))
    sampled = folders["train"] / "samples.jsonl"
    facts["sampled"] = list(read_jsonl(sampled)) if sampled.exists() else []
    facts["samples"] = paired_samples(folders["evaluate_base"], folders["evaluate_tuned"])
    facts["rejects"] = _first_lines(folders["format"] / "rejects.jsonl", 12)
    return facts


def paired_samples(base: Path, tuned: Path) -> list[dict]:
    """Join the samples of two evaluations by id, in the tuned model's order.

    Raises UserError when they were not made from the same held-out rows: a paired comparison would be meaningless.
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


def build_metrics(settings: dict, facts: dict) -> dict:
    """Return `metrics.json`: schema_version, run, verdict, heldout, fields, data, lengths, train, doctor, kept, merge,
    stages.
    """
    heldout = compare(facts)
    lengths = facts["lengths"]
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "run": settings["run"],
        "verdict": judge(facts, heldout),
        "heldout": heldout,
        "fields": field_rows(facts),
        "data": data_metrics(facts),
        "lengths": {
            "max_seq_length": lengths["max_seq_length"]["value"],
            "packing": lengths["packing"]["value"],
            "tokens": lengths.get("tokens"),
            "dropped": lengths["dropped"],
            "truncation": lengths["truncation"],
            **{name: lengths.get(name) for name in ("examples", "packs", "examples_per_pack", "fill")},
        },
        "train": {"seconds": facts["records"]["train"].get("seconds")}
        | {name: value for name, value in facts["train"].items() if name not in TRAIN_TEXTS},
        "doctor": _found(facts["train"].get("diagnoses")),
        "kept": facts["train"].get("kept"),
        "merge": facts["merge"],
        "stages": {
            stage: {name: record.get(name) for name in ("seconds", "peak_memory_bytes", "restored")}
            | ({"peak_gpu_memory_bytes": gpu} if (gpu := record.get("peak_gpu_memory_bytes")) else {})
            for stage, record in facts["records"].items()
        },
    }
    return finite(metrics)


def data_metrics(facts: dict) -> dict:
    """The counts of rows: every row in is in exactly one of DATA_CLASSES; the rest says more of some."""
    card, tokenize = facts["format"], facts["tokenize"]
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


def build_run(settings: dict, facts: dict, metrics: dict) -> dict:
    """Return `run.yaml`: every setting with its value and where it came from, stage keys and paths, versions."""
    return {
        "run": settings["run"],
        "title": title(settings),
        "verdict": metrics["verdict"]["sentence"],
        "settings": {
            row["key"]: {name: value for name, value in row.items() if name == "value" or value and name != "key"}
            for row in resolve(settings, facts)
        },
        "stages": {stage: {"key": settings["stages"].get(stage), "path": facts["paths"][stage]} for stage in STAGES},
        "versions": versions(facts),
    }


def title(settings: dict) -> str:
    """The title that the user gave, else the run's name."""
    return settings.get("title") or settings["run"]


def choices(facts: dict) -> list[dict]:
    """Every automatic choice as {key, stage, value, reason, alternatives}, in the order in which they were made."""
    found = []
    for stage, section in CHOICE_SECTIONS.items():
        own = facts[stage] if stage != "train" else {**facts["train"], **facts["plan"]}
        for name, value in own.items():
            if isinstance(value, dict) and {"value", "reason"} <= value.keys():
                entry = {"key": f"{section}.{name}", "stage": stage, "alternatives": [], **value}
                found.append(entry)
    return found


def resolve(settings: dict, facts: dict) -> list[dict]:
    """Every setting as {key, value, from, reason}: those that stages chose filled in, choices without a setting added.

    A choice stands for its setting only where that was `auto`: a value that a user gave stays the user's.
    """
    chosen = {choice["key"]: choice for choice in choices(facts)}
    rows = []
    for row in settings["resolved"]:
        choice = chosen.pop(row["key"], None)
        if choice and row["value"] == "auto":
            rows.append({"key": row["key"], "value": choice["value"], "from": "chosen", "reason": choice["reason"]})
        else:
            rows.append({"key": row["key"], "value": row["value"], "from": row["origin"], "reason": None})
    extra = [
        {"key": key, "value": choice["value"], "from": "chosen", "reason": choice["reason"]}
        for key, choice in chosen.items()
    ]
    sections = list(dict.fromkeys(row["key"].split(".")[0] for row in rows + extra))
    return sorted(rows + extra, key=lambda row: sections.index(row["key"].split(".")[0]))


def compare(facts: dict) -> dict:
    """Each held-out score of base and tuned with its interval, and their difference, paired by row where possible."""
    base, tuned = facts["evaluate_base"]["heldout"], facts["evaluate_tuned"]["heldout"]
    compared = {}
    for metric in METRICS:
        if metric not in base and metric not in tuned:
            continue
        entry = {"base": _score(base.get(metric)), "tuned": _score(tuned.get(metric)), "difference": None}
        if entry["base"] and entry["tuned"]:
            entry["difference"] = _difference(metric, base[metric], tuned[metric], facts["samples"])
        compared[metric] = entry
    return compared


def field_rows(facts: dict) -> dict[str, dict]:
    """Per-field scores of base and tuned by field name; empty where replies are not JSON."""
    fields = [facts[f"evaluate_{who}"]["heldout"].get("fields") or {} for who in ("base", "tuned")]
    names = dict.fromkeys([*fields[1], *fields[0]])
    return {name: {"base": fields[0].get(name), "tuned": fields[1].get(name)} for name in names}


def versions(facts: dict) -> dict[str, str]:
    """Package versions of all stages; where stages differ, each version with the stages that used it."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, record in facts["records"].items():
        for name, version in (record.get("versions") or {}).items():
            found.setdefault(name, {}).setdefault(str(version), []).append(stage)
    return {
        name: next(iter(by)) if len(by) == 1 else "; ".join(f"{v} ({', '.join(s)})" for v, s in by.items())
        for name, by in sorted(found.items())
    }


def finite(value: Any) -> Any:
    """The same data with None for numbers that JSON has no word for (an infinite perplexity)."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judge(facts: dict, heldout: dict) -> dict:
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


def _difference(metric: str, base: dict, tuned: dict, samples: list[dict]) -> dict:
    """Tuned less base with its interval: paired by row, or as if independent where rows have no such value."""
    rows = [per_row(metric, rows) for rows in scored(metric, samples)]
    if all(row is not None and len(row) > 1 for row in rows):
        found = statistics.paired_difference(*rows)
        return {name: found[name] for name in ("value", "ci95", "p")}
    difference = tuned["value"] - base["value"]
    errors = [score.get("stderr") for score in (base, tuned)]
    if None in errors:
        return {"value": difference, "ci95": None}
    half = 1.96 * math.hypot(*errors)
    return {"value": difference, "ci95": [difference - half, difference + half]}


def _found(diagnoses: list[dict] | None) -> list[dict] | None:
    """The doctor's findings without their words; None where it did not look."""
    names = ("name", "severity", "step")
    return diagnoses if diagnoses is None else [{name: one[name] for name in names} for one in diagnoses]


def _score(score: dict | None) -> dict | None:
    return score and {name: score.get(name) for name in ("value", "ci95", "n")}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(f"report: {path} is missing; its stage did not finish, or an older version wrote it") from None


def _first_lines(path: Path, most: int) -> list[dict]:
    """The first lines of a JSON-lines file; none where there is no such file."""
    if not path.exists():
        return []
    return [row for _, row in zip(range(most), read_jsonl(path), strict=False)]
