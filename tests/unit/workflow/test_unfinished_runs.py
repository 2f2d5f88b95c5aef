"""A sweep of which some runs have failed: the others are compared, and these named with why."""

import pytest

from adder.core.display.status import StageStatus, status_file, write_status
from adder.core.files import read_json
from adder.workflow import unfinished_runs
from adder.workflow.stage_graph import Stage
from adder.workflow.stages import SPECS
from compare_fixture import write_run


def graph(run: str, results, folders=None) -> dict[str, Stage]:
    """Some stages of a run; those of `folders` are finished."""
    stages = {name: Stage(SPECS[name], SPECS[name].settings.model_construct(), run) for name in ("train", "merge")}
    for name, spec in (("evaluate_tuned", "evaluate"), ("evaluate_base", "evaluate"), ("report", "report")):
        stages[name] = Stage(SPECS[spec], SPECS[spec].settings.model_construct(), f"{run} {name}")
    for name, stage in stages.items() if folders else ():
        (results / stage.folder).parent.mkdir(parents=True, exist_ok=True)
        (results / stage.folder).symlink_to(folders[name])
        if not (results / stage.folder / "stage.json").exists():
            (results / stage.folder / "stage.json").write_text("{}")
    return stages


@pytest.fixture
def sweep(tmp_path):
    results = tmp_path / "results"
    made = {
        name: graph(name, results, write_run(tmp_path / "made", name, right=right, heldout=20))
        for name, right in (("a", 0.9), ("b", 0.5))
    }
    made["c"] = graph("c", results)
    failed = made["c"]["train"]
    log = results / "logs" / "train" / f"{failed.key}.log"
    log.parent.mkdir(parents=True)
    write_status(status_file(log), StageStatus(error="the loss is <b>no number</b>\x1b[2J"))
    return results, made


def test_each_failed_run_says_why(sweep):
    results, runs = sweep
    runs["d"] = graph("d", results)
    assert unfinished_runs.unfinished(runs, results) == {
        "c": "train: the loss is <b>no number</b>\\x1b[2J",
        "d": unfinished_runs.NOT_RUN,
    }


def test_the_others_are_compared_and_the_comparison_is_asked_for_again(sweep, capfd):
    results, runs = sweep
    unfinished_runs.compare_finished(runs, results)
    page = (results / "compare.html").read_text()
    assert "Runs that have no result" in page and "<strong>c</strong>: train: the loss is &lt;b&gt;no number" in page
    assert "Use a" in page and read_json(results / "cache" / "compared.json") == {}


@pytest.mark.parametrize("kept", [["a", "b"], ["c"], ["a"]])
def test_where_all_or_none_have_a_result_there_is_nothing_to_do(sweep, kept):
    results, runs = sweep
    unfinished_runs.compare_finished({name: runs[name] for name in kept}, results)
    assert not (results / "compare.html").exists()


def test_a_comparison_that_cannot_be_made_ends_nothing(sweep, capfd):
    results, runs = sweep
    (results / runs["a"]["train"].folder / "metrics.jsonl").unlink()
    unfinished_runs.compare_finished(runs, results)
    assert "metrics.jsonl is missing" in capfd.readouterr().err and not (results / "compare.html").exists()
