"""Mistakes in a configuration end Snakemake with one message, which names the file, and no line of the rules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adder.workflow.settings import merged
from project import Project, write_rows

GOOD = {"model": {"source": "model"}, "data": {"sources": [{"path": "rows.jsonl"}]}}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"), GOOD)
    write_rows(project.folder / "rows.jsonl", 20)
    (project.folder / "model").mkdir()
    return project


def told(project: Project, *arguments: str) -> list[str]:
    """What Snakemake says beside the profile that it uses."""
    done = project.python("-m", "snakemake", "--cores", "1", *arguments)
    assert done.returncode == 1, done.stdout
    return [line for line in done.stdout.splitlines() if not line.startswith("Using workflow specific profile")]


def test_a_mistake_in_the_settings_names_file_key_and_what_is_allowed(untouched):
    untouched.configure({"train": {"epochs": 0}})
    head, mistake = "the settings have mistakes; nothing was run", "  - train.epochs: should be greater than 0"
    assert told(untouched) == [f"adder: config/config.yaml: {head}", f"{mistake} (found 0)"]
    (untouched.folder / "my.yaml").write_text(yaml.safe_dump(merged(GOOD, {"train": {"epochs": -2}})))
    assert told(untouched, "--configfile", "my.yaml") == [f"adder: my.yaml: {head}", f"{mistake} (found -2)"]
    (untouched.folder / "my.yaml").write_text(yaml.safe_dump(GOOD))
    lines = told(untouched, "--configfile", "my.yaml", "--config", "train={epochs: -3}")
    assert lines == [f"adder: my.yaml and --config: {head}", f"{mistake} (found '-3')"]


def test_a_key_that_stands_twice_is_told_in_a_file_given_on_the_command_line_too(untouched):
    twice = yaml.safe_dump(GOOD) + "train:\n  epochs: 1\n  epochs: 2\n"
    line = twice.count("\n")
    sentence = f"line {line}, column 3: `epochs` stands twice in one section (first on line {line - 1}); keep one"
    untouched.configure().write_text(twice)
    assert told(untouched, "-n") == [f"adder: config/config.yaml, {sentence}"]
    (untouched.folder / "my.yaml").write_text(twice)
    assert told(untouched, "-n", "--configfile", "my.yaml") == [f"adder: my.yaml, {sentence}"]


def test_a_missing_data_file_is_named_with_the_configuration(untouched):
    untouched.configure({"data": {"sources": [{"path": "nix.jsonl"}]}})
    (line,) = told(untouched, "-n")
    assert line.startswith("adder: config/config.yaml: data.sources.0.path: no file matches 'nix.jsonl'")


def test_a_stage_of_another_configuration_is_named_as_such(untouched):
    """As a cluster's job finds it, where somebody edits the configuration while the workflow runs."""
    untouched.configure()
    (line,) = told(untouched, "-n", "results/stages/train/0123456789ab/stage.json")
    assert "results/stages/train/0123456789ab is of no run of the configuration as it is now" in line


def test_a_default_configuration_that_is_not_yaml_or_not_there(untouched):
    untouched.configure().write_text("model: {source: x\ndata: [")
    (line,) = told(untouched)
    assert line == "adder: config/config.yaml, line 2, column 5: not YAML: expected ',' or '}', but got ':'"
    untouched.configure().unlink()
    (line,) = told(untouched)
    assert line.startswith("adder: config/config.yaml: can't be read (No such file or directory)")


# Root reads and writes whatever files' modes say, unless it gives that right up.
HELD_TO_MODES = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)


def told_where_modes_count(project: Project, *arguments: str) -> list[str]:
    """As `told`, of a process to which files' modes apply."""
    lead = () if os.geteuid() else HELD_TO_MODES
    if lead and (shutil.which("setpriv") is None or subprocess.run([*lead, "true"], check=False).returncode):
        pytest.skip("no setpriv here that gives root's right to all files up")
    command = [*lead, sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": project.environment}
    done = subprocess.run(command, cwd=project.folder, timeout=600, check=False, **streams)
    assert done.returncode == 1, done.stdout
    return [line for line in done.stdout.splitlines() if not line.startswith("Using workflow specific profile")]


@pytest.mark.parametrize("name", ["rows.jsonl", "model/model.safetensors", "results"])
def test_what_may_not_be_read_or_written_is_named_in_one_sentence(untouched, tiny_model_dir, name):
    if not list((untouched.folder / "model").iterdir()):
        shutil.copytree(tiny_model_dir, untouched.folder / "model", dirs_exist_ok=True)
    untouched.configure()
    place = untouched.folder / name
    if name == "results":
        place.mkdir(exist_ok=True)
    mode = place.stat().st_mode
    place.chmod(0o555 if name == "results" else 0)
    try:
        (line,) = told_where_modes_count(untouched)
    finally:
        place.chmod(mode)
    assert Path(name).name in line and "Permission denied; give yourself the right to it" in line


def test_an_option_that_would_do_something_else_than_it_says_is_refused(untouched):
    untouched.configure()
    (line,) = told(untouched, "--delete-all-output")
    assert line.startswith("adder: --delete-all-output: would remove the records of the stages and leave their data")
