"""Finished runs of one configuration, made up but consistent: what the tests of the comparison read."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.report import resolved_settings, run_metrics
from adder.report.facts import load
from adder.report.stage import ResolvedSetting
from report_fixture import write_stage_folders

Folders = dict[str, Path]
"""The folders of a run's stages, by name."""


def write_run(
    root: Path, name: str, settings: dict[str, Any] | None = None, chosen: dict[str, Any] | None = None, **options: Any
) -> Folders:
    """Write the stage folders and the report's figures of one run below `root`; return {stage: folder}.

    `settings` are what the run sets, `chosen` what its stages chose, both by key; the other options are
    write_stage_folders'.
    """
    given, inputs = write_stage_folders(root / name, run=name, **options)
    by_key = {row.key: row for row in given.resolved}
    for key, value in (settings or {}).items():
        by_key[key] = ResolvedSetting(key=key, value=value, origin="run")
    given = given.model_copy(update={"run": name, "resolved": list(by_key.values())})
    folders = inputs | {"report": root / name / "report"}
    folders["report"].mkdir()
    facts = load(inputs, given.shows)
    metrics = run_metrics.build_metrics(given, facts)
    record = resolved_settings.build_run_yaml(given, facts, metrics["verdict"]["sentence"])
    for key, value in (chosen or {}).items():
        record["settings"][key] = {"value": value, "from": "chosen", "reason": "measured"}
    write_json(folders["report"] / "metrics.json", metrics)
    (folders["report"] / "run.yaml").write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
    return folders


def copy_run(
    folders: Folders, root: Path, name: str, right: float, settings: dict[str, Any], seconds: float, seed: int = 0
) -> Folders:
    """A further run like another one, but with `right` of the rows right, these settings and this time in all.

    Quicker than write_run, so that there can be fifty; its samples, curves and figures belong together.
    """
    rng = random.Random(seed)
    made = folders | {stage: root / name / stage for stage in ("report", "train", "evaluate_tuned")}
    for stage in ("report", "train", "evaluate_tuned"):
        made[stage].mkdir(parents=True)
    samples = list(read_jsonl(folders["evaluate_tuned"] / "samples.jsonl"))
    exact = [1] * round(right * len(samples)) + [0] * (len(samples) - round(right * len(samples)))
    rng.shuffle(exact)
    write_jsonl(
        made["evaluate_tuned"] / "samples.jsonl",
        [row | {"exact_match": value} for row, value in zip(samples, exact, strict=True)],
    )
    curve = list(read_jsonl(folders["train"] / "metrics.jsonl"))
    factor = rng.uniform(0.8, 1.6)
    scaled = [
        row | {key: row[key] * factor for key in ("loss", "eval_loss") if row.get(key) is not None} for row in curve
    ]
    write_jsonl(made["train"] / "metrics.jsonl", scaled)
    write_json(made["train"] / "train.json", read_json(folders["train"] / "train.json"))
    metrics = copy.deepcopy(read_json(folders["report"] / "metrics.json"))
    metrics["run"] = name
    value = sum(exact) / len(exact)
    half = 1.96 * (value * (1 - value) / len(exact)) ** 0.5
    metrics["heldout"]["exact_match"]["tuned"] |= {
        "value": value,
        "ci95": [max(0.0, value - half), min(1.0, value + half)],
    }
    metrics["cost"]["total_seconds"] = seconds
    write_json(made["report"] / "metrics.json", metrics)
    record = yaml.safe_load((folders["report"] / "run.yaml").read_text())
    record["settings"] |= {key: {"value": value, "from": "run"} for key, value in settings.items()}
    (made["report"] / "run.yaml").write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
    return made


def change_metrics(folders: Folders, **changes: Any) -> None:
    """Replace entries of a run's metrics.json."""
    path = folders["report"] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sweep(root: Path, count: int, heldout: int = 200) -> dict[str, Folders]:
    """`count` runs that differ in four settings; the best learning rate lies in the middle, more rank costs more."""
    first = write_run(root, "first", heldout=heldout, right=0.6)
    rng, runs = random.Random(5), {}
    for n in range(count):
        rate = 1e-5 * 10 ** (2 * rng.random())
        rank, method = rng.choice([4, 8, 16, 32]), rng.choice(["qlora", "lora"])
        right = 0.93 - 0.5 * abs(-4 - math.log10(rate)) ** 1.5 + 0.001 * rank
        settings = {
            "train.learning_rate": rate, "train.lora_r": rank, "train.method": method,
            "train.early_stopping": rng.choice([None, 2]),
        }  # fmt: skip
        runs[f"run-{n:02d}"] = copy_run(first, root, f"run-{n:02d}", max(0.0, right), settings, 400 + 9 * rank, n)
    return runs
