"""docs/metrics.schema.json and docs/metrics.md against the metrics.json that the report writes, and each other."""

import copy
import csv
import io
import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from adder.core.files import read_json, write_json
from adder.report.comparison import facts, page
from adder.report.facts import load
from adder.report.run_metrics import SCHEMA_VERSION, build_metrics
from compare_fixture import write_run
from report_fixture import write_stage_folders

DOCS = Path(__file__).resolve().parents[3] / "docs"
SCHEMA = read_json(DOCS / "metrics.schema.json")
PAGE = (DOCS / "metrics.md").read_text(encoding="utf-8")
# What a stage wrote whole: it may hold more than is promised.
OPEN = {"judge", "train", "kept", "merge"}
TASKS = ("gsm8k", "arc_easy", "my_tone")
RUNS = {
    "plain": {},
    "with everything": {"tasks": TASKS, "judged": True, "merge_bases": True, "price_per_hour": 2.5, "energy": True},
    "without a guard": {"tasks": ("my_tone",)},
    "free text, no evaluation while training": {"json_replies": False, "right": 0.0, "eval_loss": False},
    "every weight trained, stages restored": {"method": "full", "restored": True},
    "rows in groups": {"groups": 7},
    "training interrupted": {"attempts": 2},
    "hostile, and ill": {"hostile": True, "course": "spiky", "tasks": TASKS, "judged": True},
}


def metrics_of(folder, **options) -> dict:
    settings, inputs = write_stage_folders(folder / "stages", heldout=30, **options)
    write_json(folder / "metrics.json", build_metrics(settings, load(inputs, settings.shows)))
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def problems(metrics: dict) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(SCHEMA).iter_errors(metrics)]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> dict:
    return metrics_of(tmp_path_factory.mktemp("full"), **RUNS["with everything"])


def test_a_finding_may_have_no_step(full):
    of_replies = {"name": "replies echo the prompt", "severity": "warning", "step": None}
    assert problems({**full, "doctor": [of_replies]}) == []


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", RUNS)
def test_what_the_report_writes_is_what_the_schema_says(tmp_path, name):
    assert problems(metrics_of(tmp_path, **RUNS[name])) == []


def test_numbers_without_a_word_in_json_are_null(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=30)
    path = inputs["evaluate_base"] / "scores.json"
    scores = read_json(path)
    scores["heldout"]["perplexity"] |= {"value": float("inf"), "ci95": [7.0, float("inf")]}
    path.write_text(json.dumps(scores))
    metrics = build_metrics(settings, load(inputs, settings.shows))
    assert metrics["heldout"]["perplexity"]["base"] == {"value": None, "ci95": [7.0, None], "n": 30}
    assert problems(json.loads(json.dumps(metrics, allow_nan=False))) == []


def changed(metrics: dict, path: str, value=None, drop: bool = False) -> dict:
    """A copy with the entry at this path set to `value`, or taken away."""
    made = copy.deepcopy(metrics)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at = made
    for part in way:
        at = at[part]
    if drop:
        del at[last]
    else:
        at[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 1), ("schema_version", "2"), ("verdict.verdict", "maybe"), ("verdict.sure", True),
        ("verdict.n", 1.5), ("verdict.ci95", [0.1]), ("heldout.exact_match.tuned.stderr", 0.1),
        ("heldout.exact_match.difference.value", "0.5"), ("tasks.0.guard", "unknown"), ("tasks.0.drop", 0.1),
        ("guard.passed", 1), ("data.rows_in", -1), ("data.rows", 3), ("stages.train.hours", 1), ("cost.price.tax", 0.2),
        ("doctor", {}), ("extra", 1),
    ],
)  # fmt: skip
def test_what_the_report_would_not_write_is_refused(full, path, value):
    assert problems(changed(full, path, value)) != []


@pytest.mark.parametrize("path", ["verdict", "verdict.p", "heldout.loss.base", "tasks.0.metric", "cost", "data.leaked",
                                  "train.steps", "merge.checked", "guard.failed", "judge.wins"])  # fmt: skip
def test_a_promised_key_may_not_be_missing(full, path):
    assert problems(changed(full, path, drop=True)) != []


def test_only_what_stages_wrote_whole_may_hold_more():
    def open_objects(spec: dict, path: str) -> set[str]:
        found = {path} if spec.get("properties") and spec.get("additionalProperties") is not False else set()
        for key in ("properties", "$defs"):
            for name, inner in spec.get(key, {}).items():
                found |= open_objects(inner, name)
        for key in ("items", "additionalProperties"):
            found |= open_objects(spec[key], path) if isinstance(spec.get(key), dict) else set()
        return found

    assert open_objects(SCHEMA, "metrics.json") == OPEN


def described(spec: dict, prefix: str = "") -> dict[str, str]:
    """Every key of the schema by its path, with its description; keys within an object that are described there not."""
    found = {}
    for name, inner in spec["properties"].items():
        if prefix and "description" not in inner:
            continue
        path, mark = prefix + name, ""
        for key, sign in (("items", "[]"), ("additionalProperties", ".*")):
            if isinstance(inner.get(key), dict) and inner[key].get("properties"):
                nested, mark = inner[key], sign
        if not mark:
            nested = inner
        found[path + mark] = inner["description"]
        if nested.get("properties"):
            found |= described(nested, f"{path}{mark}.")
    return found


def test_the_page_explains_every_key_in_the_schemas_words():
    keys, scores, differences, fields = (
        dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", part, flags=re.MULTILINE))
        for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)
        if part.startswith(("Keys", "Scores", "Differences", "Fields"))
    )
    assert keys == described(SCHEMA)
    for name, found in (("score", scores), ("difference", differences), ("field", fields)):
        assert found == described(SCHEMA["$defs"][name])


def test_the_page_explains_every_column_of_the_comparison(tmp_path):
    runs = {
        name: write_run(tmp_path, name, {"train.lora_r": rank}, right=right, heldout=30, tasks=("my_tone",))
        for name, rank, right in (("a", 8, 0.9), ("b", 16, 0.5))
    }
    header = next(csv.reader(io.StringIO(page.table(facts.compare(runs)))))
    columns = re.findall(r"`([^`]+)`", PAGE[PAGE.index("## compare.csv") :])
    scores = ("exact_match", "field_f1", "json_valid", "rouge_l", "chrf", "loss", "perplexity")
    unexplained = [
        name
        for name in header
        if name not in columns and not name.startswith((*scores, "task ")) and name != "train.lora_r"
    ]
    assert unexplained == []
    assert "train.lora_r" in header and "task my_tone" in header


def test_the_version_is_the_one_described():
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert f"`schema_version` is {SCHEMA_VERSION}." in PAGE
