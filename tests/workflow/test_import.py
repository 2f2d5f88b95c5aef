"""Other workflows import this one, and it runs from elsewhere: each way is run to a merged model and its report."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adder.core import file_lock
from adder.workflow.settings import merged
from project import ROOT, TINY

IMPORTED = """
module adder:
    snakefile: {source}
    config: config["tuning"]
    {prefix}

use rule * from adder as adder_*

onstart:
    print("the importing workflow starts")

rule all:
    default_target: True
    input: "{below}results/default/report.html", "{below}results/default/merged_model/config.json"
"""


def snakemake(folder: Path, *arguments: str) -> str:
    """Run snakemake in `folder`, with the package of this checkout installed; return its output. It must succeed."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=folder, env=environment, timeout=600, **streams)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def config(first_run) -> dict:
    """The first run's configuration with whole paths, so that it means the same in any folder; a report of its own."""
    here = {
        "model": {"source": str(first_run.folder / "model")},
        "data": {"sources": [{"path": str(first_run.folder / "rows.jsonl")}]},
        "report": {"title": "Imported"},
    }
    return merged(TINY, here)


@pytest.fixture(scope="module")
def imported(first_run, config, tmp_path_factory) -> tuple[Path, str]:
    """A workflow that has imported this one under a prefix and has run; its folder, and what that said.

    All stages have their jobs there; what most of them compute is taken from the first run.
    """
    folder = tmp_path_factory.mktemp("importer")
    first_run.copy_cache(folder / "tuning" / "results")
    source = repr(str(ROOT / "Snakefile"))
    text = IMPORTED.format(source=source, prefix='prefix: "tuning"', below="tuning/")
    (folder / "Snakefile").write_text(text)
    (folder / "my.yaml").write_text(yaml.safe_dump({"tuning": config}))
    return folder, snakemake(folder, "--configfile", "my.yaml")


def finished(folder: Path) -> bool:
    """Whether results/default below `folder` has a merged model and a verdict."""
    run = folder / "results" / "default"
    return (run / "merged_model" / "model.safetensors").exists() and "verdict" in json.loads(
        (run / "metrics.json").read_text()
    )


def test_as_a_module_under_a_prefix_with_a_configuration_of_its_own(imported):
    folder, said = imported
    assert finished(folder / "tuning") and not (folder / "results" / "default").exists()
    assert "the importing workflow starts" in said
    assert re.search(r"train: (done in|restored from)", said) and "report: done in" in said


def test_the_results_are_locked_in_a_module_too(imported):
    folder, _ = imported
    shutil.rmtree(folder / "tuning" / "results" / "default")
    with file_lock.take(folder / "tuning" / "results", "another Snakemake"), pytest.raises(AssertionError) as caught:
        snakemake(folder, "--configfile", "my.yaml")
    assert "is writing to tuning/results/; wait for it, or end it" in str(caught.value)


def test_as_a_module_from_github(imported, config, tmp_path, monkeypatch):
    """Snakemake fetches the Snakefiles and scripts; the package is the installed one. Git takes a repository here."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("Snakefile", "rules", "workflow_scripts", "envs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, repository / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{repository}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/somebody/adder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "importer"
    folder.mkdir()
    shutil.copytree(imported[0] / "tuning" / "results" / "cache", folder / "results" / "cache")
    source = 'github("somebody/adder", path="Snakefile", branch="main")'
    (folder / "Snakefile").write_text(IMPORTED.format(source=source, prefix="", below=""))
    (folder / "my.yaml").write_text(yaml.safe_dump({"tuning": config}))
    said = snakemake(folder, "--configfile", "my.yaml")
    assert finished(folder) and said.count("restored from an equal earlier result") == 11


def test_from_another_directory(imported, config, tmp_path):
    shutil.copytree(imported[0] / "tuning" / "results" / "cache", tmp_path / "results" / "cache")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    where = ["-s", str(ROOT / "Snakefile"), "-d", str(tmp_path), "--configfile", str(tmp_path / "my.yaml")]
    snakemake(tmp_path.parent, "merged_model", *where)
    assert finished(tmp_path)
