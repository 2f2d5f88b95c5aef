"""run.yaml: every setting with where it came from."""

import yaml

from adder.report import resolved_settings, run, run_metrics
from adder.report.facts import load
from adder.report.page_section import RunReport
from report_fixture import write_stage_folders


def test_run_yaml_says_where_every_setting_came_from(finished, tmp_path):
    record = yaml.safe_load((finished / "run.yaml").read_text(encoding="utf-8"))
    settings, _ = write_stage_folders(tmp_path / "stages", heldout=5)
    rows = record["settings"]
    for row in settings.resolved:
        found = rows[row.key]
        if found["from"] == "chosen":
            assert row.value == "auto" and found["reason"]
        else:
            assert found == {"value": row.value, "from": row.origin}
    assert rows["lengths.max_seq_length"]["value"] == 256 and rows["lengths.max_seq_length"]["from"] == "chosen"
    assert rows["train.compute_dtype"]["value"] == "float32"
    assert rows["train.gradient_accumulation_steps"]["from"] == "chosen"
    assert rows["evaluate.max_new_tokens"]["value"] == 69
    assert record["stages"]["train"]["key"] == settings.stages["train"]
    assert record["stages"]["train"]["path"].endswith(f"train/{settings.stages['train']}")
    assert record["versions"]["torch"] == "2.13.0"
    assert yaml.safe_load(yaml.safe_dump(record)) == record


def test_a_value_that_the_user_gave_is_not_shown_as_chosen(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    for row in settings.resolved:
        if row.key == "lengths.max_seq_length":
            row.value, row.origin = 256, "config"
    facts = load(inputs, settings.shows)
    found = {row["key"]: row for row in resolved_settings.resolve(settings, facts)}
    assert found["lengths.max_seq_length"] == {
        "key": "lengths.max_seq_length", "value": 256, "from": "config", "reason": None
    }  # fmt: skip
    view = run.build_view(RunReport(settings, facts, run_metrics.build_metrics(settings, facts)))
    assert "lengths.max_seq_length" not in [choice.key for choice in view["choices"]["choices"]]
