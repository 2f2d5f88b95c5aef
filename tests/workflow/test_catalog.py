"""What the workflow catalog and snakedeploy expect of a workflow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from project import ROOT


def dry_run(folder: Path) -> str:
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile"), "-n", "--cores", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=folder, env=environment, timeout=600, **streams)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_workflow_is_found_where_the_catalog_looks_and_makes_models_by_default(tmp_path):
    shutil.copytree(ROOT / ".test", tmp_path / "test", ignore=shutil.ignore_patterns("results", ".snakemake"))
    shown = dry_run(tmp_path / "test")
    for rule in ("download_model", "train_adapter", "write_report", "link_run"):
        assert f"\n{rule} " in shown, rule


def test_the_catalog_is_told_how_this_is_used():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert {"mandatory-flags", "software-stack-deployment", "report"} == usage.keys()
    assert usage["software-stack-deployment"]["conda"] and (ROOT / "envs" / "adder.yaml").is_file()
