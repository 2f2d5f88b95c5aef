"""What the report knows: the stage folders as one plain dictionary, `metrics.json` and `run.yaml` made of it."""

import math
from pathlib import Path
from typing import Any

from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.report import regression_guard, scores

SCHEMA_VERSION = 2
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
GUARD = {True: "passed", False: "failed"}
# What becomes of a row: one of these.
DATA_CLASSES = ("train", "heldout", "tests", "duplicates", "near_duplicates", "leaked", "left_out", "rejected")
# What train.json says in words, for people: not figures.
TRAIN_TEXTS = ("advice", "diagnoses", "kept", "preflight")
# Choices whose name in a stage's file is a setting of this section.
CHOICE_SECTIONS = {"lengths": "lengths", "train": "train", "merge": "merge", "evaluate_tuned": "evaluate"}


def load(inputs: dict[str, Path]) -> dict[str, Any]:
    """Read all stage folders: {stage: its facts}, and `records`, `plan`, `curve`, `sampled` (replies while training),
    `samples` (of the evaluations), `rejects`, `paths`, `tasks` (see report_scores.read_tasks), `judge` (None without
    one), `judgements`.

    `inputs`: the folders of STAGES, of `task_base_0`, `task_tuned_0` and so on, and of `judge` where these ran.
    Raises UserError where a stage or one of its files is missing.
    """
    missing = [stage for stage in STAGES if stage not in inputs]
    if missing:
        raise UserError(f"report: no folder given for {', '.join(missing)}; it needs {', '.join(STAGES)}")
    # In the order in which a reader follows a run; Snakemake gives them by name.
    tasks = [f"task_{who}_{number}" for number in range(len(inputs)) for who in ("base", "tuned")]
    folders = {stage: Path(inputs[stage]) for stage in (*STAGES, *tasks, "judge") if stage in inputs}
    facts: dict[str, Any] = {stage: _read(folders[stage] / FACTS[stage]) for stage in STAGES}
    facts["records"] = {stage: _read(folder / "stage.json") for stage, folder in folders.items()}
    facts["paths"] = {stage: folder.as_posix() for stage, folder in folders.items()}
    facts["plan"] = _read(folders["train"] / "plan.json")
    facts["curve"] = list(read_jsonl(folders["train"] / "metrics.jsonl"))
    sampled = folders["train"] / "samples.jsonl"
    facts["sampled"] = list(read_jsonl(sampled)) if sampled.exists() else []
    facts["samples"] = scores.paired_samples(folders["evaluate_base"], folders["evaluate_tuned"])
    facts["tasks"] = scores.read_tasks(folders)
    facts["judge"] = _read(folders["judge"] / "judge.json") if "judge" in folders else None
    facts["judgements"] = list(read_jsonl(folders["judge"] / "judgements.jsonl")) if "judge" in folders else []
    facts["rejects"] = _first_lines(folders["format"] / "rejects.jsonl", 12)
    return facts


def build_metrics(settings: dict, facts: dict) -> dict:
    """Return `metrics.json`: schema_version, run, verdict, heldout, fields, tasks, guard, judge, data, lengths, train,
    doctor, kept, merge, stages, cost. Its keys are described in docs/metrics.md.
    """
    heldout = scores.compare(facts)
    tasks, guarded = guarded_tasks(scores.compare_tasks(facts["tasks"], settings["tasks"]))
    lengths = facts["lengths"]
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "run": settings["run"],
        "verdict": scores.verdict(facts, heldout),
        "heldout": heldout,
        "fields": scores.field_rows(facts),
        "tasks": tasks,
        "guard": guarded,
        "judge": facts["judge"],
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
            | {name: record[name] for name in ("peak_gpu_memory_bytes", "attempts") if record.get(name)}
            for stage, record in facts["records"].items()
        },
        "cost": cost(settings, facts["records"]),
    }
    return finite(metrics)


def guarded_tasks(rows: list[dict]) -> tuple[list[dict], dict | None]:
    """The compared tasks with the guard's word for each, and {passed, failed: names}; None where none is guarded."""
    words = [None if row["max_drop"] is None else GUARD[regression_guard.check([row])["passed"]] for row in rows]
    rows = [row | {"guard": found} for row, found in zip(rows, words, strict=True)]
    failed = [row["task"] for row in rows if row["guard"] == "failed"]
    return rows, {"passed": not failed, "failed": failed} if any(words) else None


def cost(settings: dict, records: dict[str, dict]) -> dict:
    """Seconds of each stage and of all; their price where an hour has one; their energy where stages recorded it.

    A stage counts as it was computed, also where its result was taken from an equal earlier one.
    """
    seconds = {stage: record["seconds"] for stage, record in records.items()}
    total, hourly = sum(seconds.values()), settings["price_per_hour"]
    joules = {stage: record["energy_joules"] for stage, record in records.items() if "energy_joules" in record}
    return {
        "seconds": seconds,
        "total_seconds": total,
        "price": None
        if hourly is None
        else {"value": hourly * total / 3600, "per_hour": hourly, "currency": settings["currency"]},
        "energy": {"joules": sum(joules.values()), "stages": joules} if joules else None,
    }


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
        "stages": {
            stage: {"key": settings["stages"].get(stage), "path": path} for stage, path in facts["paths"].items()
        },
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


def _found(diagnoses: list[dict] | None) -> list[dict] | None:
    """The doctor's findings without their words; None where it did not look."""
    names = ("name", "severity", "step")
    return diagnoses if diagnoses is None else [{name: one[name] for name in names} for one in diagnoses]


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
