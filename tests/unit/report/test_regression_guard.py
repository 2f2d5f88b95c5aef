"""The regression guard: what fails a run, which way is worse, and what the job says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adder.report import regression_guard

SCRIPTS = Path(__file__).parents[3] / "workflow_scripts"


def entry(change=-0.03, max_drop=0.02, ci95=(-0.05, -0.01), higher_is_better=True, task="gsm8k"):
    """One of the tasks in a metrics.json."""
    return {
        "task": task, "metric": "acc", "base": {"value": 0.5}, "tuned": {"value": 0.5 + change},
        "difference": {"value": change, "ci95": list(ci95), "p": 0.01}, "max_drop": max_drop,
        "higher_is_better": higher_is_better,
    }  # fmt: skip


def test_a_drop_beyond_what_is_allowed_fails():
    found = regression_guard.check([entry(), entry(change=0.1, ci95=(0.05, 0.15), task="mmlu")])
    assert found["passed"] is False and found["failed"] == ["gsm8k"]
    assert "gsm8k: acc got worse by 0.03, from 0.5 to 0.47; max_drop allows 0.02." in found["sentence"]
    assert "mmlu" not in found["sentence"]


def test_the_measured_drop_decides_and_what_chance_may_do_is_said():
    unsure = regression_guard.check([entry(ci95=(-0.08, 0.02))])
    assert not unsure["passed"] and "interval, -0.02 to 0.08, doesn't rule out an allowed one" in unsure["sentence"]
    assert "rule out" not in regression_guard.check([entry(ci95=(-0.05, -0.025))])["sentence"]
    passed = regression_guard.check([entry(change=-0.01, ci95=(-0.06, 0.04))])
    assert passed["passed"] and "fell by 0.01 of 0.02 allowed. Its 95 % interval reaches 0.06" in passed["sentence"]


@pytest.mark.parametrize(
    ("change", "higher_is_better", "passed"),
    [(-0.03, True, False), (0.03, True, True), (0.03, False, False), (-0.03, False, True), (0.0, True, True)],
)
def test_which_way_is_worse(change, higher_is_better, passed):
    found = regression_guard.check([entry(change=change, higher_is_better=higher_is_better)])
    assert found["passed"] is passed and found["failed"] == ([] if passed else ["gsm8k"])


def test_just_what_is_allowed_passes():
    assert regression_guard.check([entry(change=0.57 - 0.59)])["passed"]  # 0.020000000000000018
    assert regression_guard.check([entry(change=0.0, max_drop=0.0)])["passed"]
    assert not regression_guard.check([entry(change=-1 / 1319, max_drop=0.0)])["passed"]


def test_tasks_without_a_max_drop_are_not_guarded():
    found = regression_guard.check([entry(max_drop=None)])
    assert found == {"passed": True, "failed": [], "sentence": "No task has a max_drop."}


def run_script(folder, tasks):
    """The job as Snakemake runs it, with the names that it would have."""
    (folder / "metrics.json").write_text(json.dumps({"tasks": tasks}))
    program = (
        "import runpy, types; io = lambda *paths: list(paths); snakemake = types.SimpleNamespace("
        f"input=io({str(folder / 'metrics.json')!r}), output=io({str(folder / 'guard.json')!r}), "
        f"log=io({str(folder / 'guard.log')!r})); runpy.run_path('check_guard.py', {{'snakemake': snakemake}})"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True)


def test_the_job_fails_with_one_message(tmp_path):
    job = run_script(tmp_path, [entry()])
    assert job.returncode == 1 and job.stderr.startswith("guard: gsm8k: acc got worse by 0.03")
    assert "report.html are there all the same" in job.stderr and "Traceback" not in job.stderr
    assert not (tmp_path / "guard.json").exists() and "got worse" in (tmp_path / "guard.log").read_text()


def test_the_job_leaves_a_record(tmp_path):
    job = run_script(tmp_path, [entry(change=-0.01)])
    assert job.returncode == 0 and json.loads((tmp_path / "guard.json").read_text())["passed"] is True
