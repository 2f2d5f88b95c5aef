"""metrics.json: what it holds, and that it is JSON."""

import json

import pytest

from adder.core.files import read_json, write_json
from adder.report import run_metrics
from adder.report.facts import STAGES
from report_fixture import write_stage_folders
from report_pages import make_again, page_of


def test_metrics_hold_what_the_schema_promises(finished):
    metrics = read_json(finished / "metrics.json")
    assert metrics["schema_version"] == 2 and metrics["run"] == "default"
    for name in ("exact_match", "loss", "perplexity", "json_valid", "field_f1"):
        entry = metrics["heldout"][name]
        for who in ("base", "tuned"):
            assert entry[who].keys() == {"value", "ci95", "n"} and entry[who]["n"] == 200
            low, high = entry[who]["ci95"]
            assert low <= entry[who]["value"] <= high
        low, high = entry["difference"]["ci95"]
        assert low <= entry["difference"]["value"] <= high
        assert entry["difference"]["value"] == pytest.approx(entry["tuned"]["value"] - entry["base"]["value"], abs=1e-6)
    assert metrics["verdict"].keys() >= {"verdict", "metric", "difference", "ci95", "sentence"}
    assert (metrics["verdict"]["verdict"], metrics["verdict"]["metric"]) == ("better", "exact_match")
    assert set(metrics["stages"]) == set(STAGES)
    for stage in metrics["stages"].values():
        assert stage["seconds"] > 0 and stage["peak_memory_bytes"] > 0 and stage["restored"] is False
    found = metrics["data"]
    assert found["rows_in"] == sum(found[name] for name in run_metrics.DATA_CLASSES)
    assert (found["tests"], found["near_duplicates"], found["left_out"], found["repeats"]) == (40, 9, 210, 50)
    assert (found["overlap_found"], found["not_tokenized"], metrics["lengths"]["dropped"]) == (6, 1, 3)
    assert metrics["lengths"]["max_seq_length"] == 256 and metrics["lengths"]["packing"] is True


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=20)
    path = inputs["evaluate_base"] / "scores.json"
    scores = read_json(path)
    infinite = float("inf")
    scores["heldout"]["perplexity"] = {"value": infinite, "ci95": [1.0, infinite], "n": 20, "stderr": float("nan")}
    scores["heldout"]["loss"]["ci95"] = [0.1, infinite]
    write_json(path, scores)
    out = make_again(tmp_path, settings, inputs)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["heldout"]["perplexity"]["base"] == {"value": None, "ci95": [1.0, None], "n": 20}
    page_of(out)
