"""Killed and started again: the workflow goes on where it was and ends with the same adapter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from adder.core import file_lock
from adder.core.files import digest_file, read_json
from adder.workflow.settings import merged
from project import Project

LONG = {"train": {"epochs": 60, "learning_rate": 2e-3}}


def training(project: Project) -> Path:
    """The folder of the training of the run that the results show."""
    page = yaml.safe_load((project.folder / "results" / "default" / "run.yaml").read_text())
    return project.folder / "results" / "stages" / "train" / page["stages"]["train"]["key"]


def adapter(project: Project) -> str:
    """Digest of its adapter."""
    return digest_file(training(project) / "adapter" / "adapter_model.safetensors")


def test_a_workflow_killed_while_training_goes_on(project):
    """kill -9 of everything, Snakemake included, then the same command: no lock to remove, no step lost twice."""
    project.configure(LONG)
    command = [sys.executable, "-m", "snakemake", "merged_model", "--cores", "1"]
    options = {"cwd": project.folder, "env": project.environment, "start_new_session": True}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    results = project.folder / "results"
    while not list(results.glob("checkpoints/*/checkpoint-*/seal.json")):
        assert process.poll() is None, "training ended before there was a checkpoint"
        time.sleep(0.05)
    second = project.python(*command[1:])
    assert second.returncode == 1 and f"another Snakemake (process {process.pid} on " in second.stdout
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    assert "train: continuing from the checkpoint at step" in project.snakemake("merged_model", config=LONG)
    continued = adapter(project)
    assert not list(results.glob("checkpoints/*"))
    record = read_json(training(project) / "stage.json")
    assert record["attempts"] == 2 and project.result("metrics.json")["cost"]["seconds"]["train"] == record["seconds"]

    again = merged(LONG, {"runtime": {"restore": False}})
    project.snakemake("merged_model", "--forcerun", "train_adapter", config=again)
    assert adapter(project) == continued


@pytest.mark.parametrize("asked", [["-n"], ["--lint"], ["--dag"], ["--rulegraph"], ["--summary"], ["--list-rules"]])
def test_what_only_reads_is_let_in_while_another_snakemake_writes(project, asked):
    other = {"train": {"seed": 7}}  # there is work to do
    with file_lock.take(project.folder / "results", "another Snakemake"):
        project.snakemake(*asked, config=other)
        done = project.python("-m", "snakemake", "merged_model", "--cores", "1")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"adder: another Snakemake (process {os.getpid()} on ") and "writing to results/" in last
