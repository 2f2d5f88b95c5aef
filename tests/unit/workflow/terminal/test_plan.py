"""What the terminal calls stages, by the runs that share them."""

import pytest

from adder.workflow import stage_graph
from adder.workflow.terminal import plan

KEY = "0123456789ab"


@pytest.fixture
def announced(tmp_path, monkeypatch):
    """The plan of a sweep of two runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = {
        "model": {"source": "model"},
        "data": {"sources": [{"path": "rows.jsonl"}]},
        "runs": {"low": {}, "high": {"train": {"learning_rate": 1e-3}}},
    }
    graphs = stage_graph.runs_of(config)
    plan.announce({run: graph.stages for run, graph in graphs.items()}, tmp_path / "results")
    yield {run: graph.stages for run, graph in graphs.items()}
    plan.announce({}, tmp_path)


def test_a_stage_bears_its_runs_name_where_others_have_one_of_their_own(announced):
    known = plan.current()
    assert known is not None
    labels = {name: known.label(stage.folder) for name, stage in announced["high"].items()}
    assert labels["data"] == "data" and labels["train"] == "train high"
    assert labels["evaluate_base"] == "evaluate base" and labels["evaluate_tuned"] == "evaluate tuned high"


def test_the_jobs_are_those_that_make_a_stage(announced):
    train = announced["low"]["train"]
    plan.begin([f"prefix/results/{train.folder}/stage.json", "results/low/report.html", "other/file"], at_once=4)
    known = plan.current()
    assert known is not None and known.jobs == [train.folder] and known.at_once == 4


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        (f"results/stages/train/{KEY}/stage.json", f"stages/train/{KEY}"),
        (f"/elsewhere/tuning/results/stages/evaluate/{KEY}/stage.json", f"stages/evaluate/{KEY}"),
        (f"results/stages/train/{KEY}/adapter/stage.json", None),
        ("results/default/report.html", None),
        ("", None),
    ],
)
def test_a_stage_is_told_by_its_record(output, folder):
    assert plan.stage_of(output) == folder


def test_other_jobs_are_known_by_their_rule_also_under_a_prefix(announced):
    assert plan.side_job("check_guard", "low") == "guard low" == plan.side_job("adder_check_guard", "low")
    assert plan.side_job("compare_runs", None) == "compare"
    assert plan.side_job("align_reads", "low") is None
