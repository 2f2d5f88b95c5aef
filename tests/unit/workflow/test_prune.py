"""`make prune` lists what no configuration needs, and removes nothing while somebody writes to the results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adder.core import file_lock

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def prune(tmp_path):
    """Run `make prune` for a configuration with nobody at the keyboard; return its exit status and what it says."""
    (tmp_path / "my.yaml").write_text("model: {source: a/b}\ndata: {sources: [{builtin: tickets, rows: 9}]}\n")
    script = ROOT / "workflow_scripts" / "prune.py"

    def run(*arguments: str) -> tuple[int, str]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([sys.executable, script, "my.yaml", *arguments], cwd=tmp_path, **streams)
        return done.returncode, done.stdout

    return run


def test_prune_refuses_while_a_snakemake_writes_or_a_job_that_outlived_one(tmp_path, prune):
    unneeded = tmp_path / "results" / "stages" / "format" / ("0" * 12)
    unneeded.mkdir(parents=True)
    me = rf"\(process {os.getpid()} on .+\)"
    with file_lock.take(tmp_path / "results", "another Snakemake"):
        code, told = prune("--yes")
    assert code == 1
    assert re.fullmatch(rf"prune: another Snakemake {me} is writing to results/; wait for it, or end it\n", told)
    with file_lock.held(unneeded.with_name(".abc.lock"), print):
        code, told = prune("--yes")
    assert code == 1
    place = "results/stages/format/abc"
    assert re.fullmatch(rf"prune: another process {me} is still at work on {place}; wait for it, or end it\n", told)
    assert unneeded.exists()
    left = unneeded.with_name(".killed.lock")
    left.write_text("another process (process 1 on somewhere)")
    assert prune("--yes")[0] == 0 and not unneeded.exists() and not left.exists()


def test_prune_takes_nobody_there_for_a_no_and_makes_no_results(tmp_path, prune):
    assert prune() == (0, "Nothing to prune: there is no results/.\n")
    assert not (tmp_path / "results").exists()
    unneeded = tmp_path / "results" / "stages" / "format" / ("0" * 12)
    unneeded.mkdir(parents=True)
    code, told = prune()
    assert code == 0 and told.endswith("Remove them? [y/N] \nNothing was removed.\n") and unneeded.exists()
