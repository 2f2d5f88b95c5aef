"""Settings: defaults, overrides, and mistakes that are refused with the key, what was found and what is allowed."""

import json
from pathlib import Path

import pytest
import yaml

from adder.core.errors import UserError
from adder.workflow.settings import Settings, load, merged, resolved, section_of
from adder.workflow.settings_docs import schema

ROOT = Path(__file__).resolve().parents[3]
BASE = {"model": {"source": "some/model"}, "data": {"sources": [{"path": "rows.jsonl"}]}}


def problems(change: dict) -> str:
    with pytest.raises(UserError) as caught:
        load(merged(BASE, change))
    return str(caught.value)


def test_defaults_are_those_that_the_readme_promises():
    run = load(BASE)["default"]
    train = run.train
    assert (train.method, train.learning_rate, train.lr_scheduler, train.warmup_ratio) == (
        "qlora",
        1e-4,
        "cosine",
        0.05,
    )
    assert (train.weight_decay, train.effective_batch_size, train.max_grad_norm, train.seed) == (0.01, 16, 1.0, 42)
    assert (train.lora_r, train.lora_alpha, train.lora_dropout, train.target_modules) == (16, 32, 0.05, "all-linear")
    assert (run.lengths.max_seq_length, run.lengths.packing, run.data.heldout.share) == ("auto", "auto", 0.1)


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ({"train": {"learnin_rate": 1}}, ["train.learnin_rate: unknown setting; did you mean `learning_rate`?"]),
        ({"data": {"max_examples": 5}}, ["data.max_examples: unknown setting; did you mean `train.max_examples`?"]),
        ({"trian": {}}, ["trian: unknown setting; did you mean `train`?"]),
        ({"train": {"zzz": 1}}, ["train.zzz: unknown setting; allowed here: best_by, compute_dtype, "]),
        ({"train": {"epochs": -1}}, ["train.epochs: should be greater than 0 (found -1)"]),
        (
            {"data": {"heldout": {"share": 0}}},
            ["data.heldout.share: should be greater than 0 and less than 1 (found 0)"],
        ),
        (
            {"train": {"lora_plus_ratio": 200}},
            ["train.lora_plus_ratio: should be greater than or equal to 1 and less than or equal to 100 (found 200)"],
        ),
        (
            {"evaluate": {"tasks": [{"name": "a", "max_drop": 2}]}},
            ["evaluate.tasks.0.max_drop: should be greater than or equal to 0 and less than or equal to 1 (found 2)"],
        ),
        ({"lengths": {"max_seq_length": 3}}, ["lengths.max_seq_length: should be 'auto' or greater than or equal to"]),
        (
            {"data": {"sources": [{"path": "a.jsonl", "row_format": "share_gpt"}]}},
            ["data.sources.0.row_format: should be 'auto', 'messages', 'sharegpt', "],
        ),
        ({"train": {"method": "qlorra"}}, ["train.method: should be 'qlora', 'lora' or 'full' (found 'qlorra')"]),
        (
            {"train": {"method": "full", "lora_r": 8}},
            ["train: method: full trains every weight, so lora_r would have no effect; remove it"],
        ),
        (
            {"train": {"lora_r": 8}, "runs": {"a": {"train": {"method": "full", "lora_r": 4, "lora_dropout": 0}}}},
            ["runs.a.train: method: full trains every weight, so lora_dropout, lora_r would have no effect"],
        ),
        ({"train": {"lr": 1e-3}}, ["train.lr: unknown setting; did you mean `learning_rate`?"]),
        ({"lengths": {"max_seq_length": "atuo"}}, ["lengths.max_seq_length: should be 'auto' or a valid integer"]),
        ({"data": {"heldout": {"share": 0.1, "size": 5}}}, ["data.heldout: only one of share, size and sources"]),
        (
            {"data": {"sources": [{"path": "a", "builtin": "tickets"}]}},
            ["data.sources.0: a source has one of path, url, hub, builtin, found path and builtin"],
        ),
        (
            {"data": {"sources": [{"path": "a", "config": "test"}]}},
            ["data.sources.0: `config` goes with `hub`, not with"],
        ),
        (
            {"data": {"heldout": {"group_by": "author", "stratify_by": "topic"}}},
            ["data.heldout: only one of group_by and stratify_by can be set"],
        ),
        ({"data": {"sources": []}}, ["data.sources: List should have at least 1 item"]),
        ({"model": {"source": None}}, ["model.source: should be a valid string (found None)"]),
        ({"train": {"early_stopping": True}}, ["train.early_stopping: should be a number, not true (found True)"]),
        ({"train": {"epochs": float("inf")}}, ["train.epochs: should be a finite number (found inf)"]),
        ({"runs": {"a/b": {}}}, ["runs.a/b: a run's name is a directory's name"]),
        ({"runs": {"r" * 300: {}}}, [f"runs.{'r' * 30}…: a run's name is a directory's name; 300 bytes are too many"]),
        ({"runs": {"ü" * 100: {}}}, [f"runs.{'ü' * 30}…: a run's name is a directory's name; 200 bytes are too many"]),
        ({"runs": {"logs": {}}}, ["runs.logs: results/logs is where something else is kept"]),
        ({"runs": {"a": {"train": {"epohs": 1}}}}, ["runs.a.train.epohs: unknown setting; did you mean `epochs`?"]),
        ({"runs": {"a": {"runtime": {"threads": 1}}}}, ["runs.a.runtime: belongs to the machine"]),
        (
            {"train": {"epochs": 0, "lora_r": 0}},
            ["train.epochs: ", "train.lora_r: should be greater than or equal"],
        ),
        (
            {"merge": {"base": "dequantized"}, "train": {"method": "lora"}},
            ["merge.base: dequantized is for train.method: qlora; with lora the base isn't quantised"],
        ),
        ({"evaluate": {"tasks": [{"limit": 5}]}}, ["evaluate.tasks.0: a task has either `name` or `path`"]),
        ({"evaluate": {"judge": {"base_url": "ftp://x", "model": "m"}}}, ["evaluate.judge.base_url: "]),
        ({"export": {"hub": "no-owner"}}, ["export.hub: "]),
    ],
)
def test_mistakes_are_named(change, sentences):
    message = problems(change)
    assert message.startswith("the settings have mistakes; nothing was run\n")
    for sentence in sentences:
        assert f"  - {sentence}" in message


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("8", "runs.8: YAML reads the name 8 as a number, and a run's name is text; put it in quotes"),
        ("0.1", "runs.0.1: YAML reads the name 0.1 as a number"),
        ("on", "runs.True: YAML reads the name on, yes or true as true or false"),
        ("no", "runs.False: YAML reads the name off, no or false as true or false"),
        ("~", "runs.None: YAML reads the name null or nothing as nothing"),
        ("2026-01-02", "runs.2026-01-02: YAML reads the name 2026-01-02 as date"),
    ],
)
def test_names_of_runs_that_yaml_reads_as_something_else_are_refused(written, sentence):
    assert sentence in problems(yaml.safe_load(f"runs: {{{written}: {{}}}}"))
    quoted = yaml.safe_load(f"runs: {{'{written}': {{train: {{epochs: 1}}}}}}")
    if written != "~":
        runs = load(merged(BASE, quoted))
        assert {row["key"]: row["origin"] for row in map(dict, resolved(runs[written], quoted, written))}[
            "train.epochs"
        ] == "run"


def _numbers(section: type, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The paths of all settings that are numbers."""
    found = []
    for name, field in section.model_fields.items():
        inner, kinds = section_of(field.annotation), str(field.annotation)
        if inner is not None:
            found += _numbers(inner, (*path, name, *(["0"] if "list" in kinds else [])))
        elif ("int" in kinds or "float" in kinds) and "bool" not in kinds:
            found.append((*path, name))
    return found


NUMBERS = [path for path in _numbers(Settings, ()) if len(path) < 6]


@pytest.mark.parametrize("value", [True, False, float("inf"), float("nan")])
def test_no_number_of_the_configuration_takes_what_is_none(value):
    assert ("train", "epochs") in NUMBERS and ("data", "sources", "0", "weight") in NUMBERS
    for path in NUMBERS:
        change: object = value
        for part in reversed(path):
            change = [change] if part == "0" else {part: change}
        assert f"  - {'.'.join(path)}: " in problems(change), path  # pyright: ignore[reportArgumentType] - a dict


def test_auto_can_be_written_out():
    change = {
        "lengths": {"max_seq_length": "auto", "packing": "auto"},
        "train": {"micro_batch_size": "auto", "gradient_checkpointing": "auto"},
        "merge": {"tolerance": "auto"},
        "evaluate": {"max_new_tokens": "auto", "batch_size": "auto"},
        "runtime": {"threads": "auto"},
    }
    assert load(merged(BASE, change)) == load(BASE)
    assert load(merged(BASE, {"lengths": {"max_seq_length": 512}}))["default"].lengths.max_seq_length == 512


def test_a_mistake_in_the_common_part_is_told_once():
    message = problems({"train": {"epochs": 0}, "runs": {"a": {}, "b": {}}})
    assert message.count("train.epochs") == 1 and "runs." not in message


def test_missing_keys_are_named():
    with pytest.raises(UserError, match="model: must be set\n  - data: must be set"):
        load({})


def test_yaml_numbers_without_a_point_are_numbers():
    config = yaml.safe_load("train: {learning_rate: 2e-4}")  # YAML 1.1 reads 2e-4 as text
    assert load(merged(BASE, config))["default"].train.learning_rate == 2e-4


def test_a_bare_off_is_off():
    config = yaml.safe_load("{export: {gguf: off}, format: {near_duplicates: off}}")
    assert config["export"]["gguf"] is False
    settings = load(merged(BASE, config))["default"]
    assert (settings.export.gguf, settings.format.near_duplicates) == ("off", "off")


def test_runs_override_and_lists_are_replaced():
    config = merged(BASE, {"train": {"epochs": 3}, "runs": {"a": {}, "b": {"data": {"sources": [{"path": "x.csv"}]}}}})
    runs = load(config)
    assert [run.train.epochs for run in runs.values()] == [3, 3]
    assert [run.data.sources[0].path for run in runs.values()] == ["rows.jsonl", "x.csv"]


def test_every_setting_knows_where_it_came_from():
    config = merged(BASE, {"train": {"epochs": 3}, "runs": {"a": {"train": {"lora_r": 8}}}})
    origins = {row.key: (row.value, row.origin) for row in resolved(load(config)["a"], config, "a")}
    assert origins["train.epochs"] == (3.0, "config")
    assert origins["train.lora_r"] == (8, "run")
    assert origins["train.lora_alpha"] == (32.0, "default")


def test_what_runs_share_of_lora_does_not_concern_a_full_training_among_them():
    config = merged(BASE, {"train": {"lora_r": 8}, "runs": {"lora": {}, "full": {"train": {"method": "full"}}}})
    runs = load(config)
    assert (runs["lora"].train.lora_r, runs["full"].train.method) == (8, "full")
    keys = {name: {row.key for row in resolved(run, config, name)} for name, run in runs.items()}
    assert "train.lora_r" in keys["lora"] - keys["full"] and "train.epochs" in keys["full"]


def test_the_schema_accepts_the_default_configuration():
    import jsonschema

    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    jsonschema.validate(config, json.loads(schema()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(config, {"train": {"epohs": 1}}), json.loads(schema()))


def test_a_secret_is_refused_wherever_it_stands_before_any_mistake_shows_it():
    written = problems({"model": {"source": "https://me:hunter2@host/model"}, "train": {"epochs": "hf_" + "aB3" * 12}})
    assert "model.source: what stands before @" in written and "train.epochs: what stands there" in written
    assert "hunter2" not in written and "aB3" not in written
    assert "runs.a.model.source" in problems({"runs": {"a": {"model": {"source": "https://host/m?token=hunter2"}}}})
