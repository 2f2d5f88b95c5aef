"""The configurations in config/examples parse and dry-run; mistakes in one end before any job."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from project import ROOT

EXAMPLES = sorted((ROOT / "config" / "examples").glob("*.yaml"))


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "-n", "merged_model", "--cores", "1", "-s", str(ROOT / "Snakefile")]
    command.append("--logger-adder-plain")
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working directory that has the example's data file and our examples."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "tickets.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "config").symlink_to(ROOT / "config")
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_dry_runs(example, folder):
    data = example.stem.partition("-")[0]
    if data in ("snips", "gsm8k"):
        if not (ROOT.parent / "shared" / "data" / data).exists():
            pytest.skip(f"../shared/data/{data} is not here")
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")
    done = dry_run(folder, "--configfile", str(example))
    assert done.returncode == 0, done.stdout + done.stderr
    runs = len(yaml.safe_load(example.read_text()).get("runs", {"default": {}}))
    assert f"train_adapter{runs:>14}".replace(" ", "") in (done.stdout + done.stderr).replace(" ", "")
    assert f"evaluate_model{1 + runs}" in (done.stdout + done.stderr).replace(" ", "")


def test_the_readmes_first_configuration_runs_as_it_stands(folder):
    """In a folder that has no data, of rows and a model that need no file and no hub; jobs are only planned here."""
    shown = re.search(r"Write `my.yaml`.*?```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    shutil.rmtree(folder / "data")
    (folder / "my.yaml").write_text(shown)
    done = dry_run(folder, "--configfile", "my.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    config = yaml.safe_load(shown)
    (source,), (run,) = config["data"]["sources"], config["runs"]
    assert config["model"]["source"].startswith("wheel:") and source["builtin"]
    assert f"results/{run}/" in done.stdout + done.stderr


def test_a_mistake_ends_the_workflow_in_one_message(folder):
    (folder / "my.yaml").write_text(
        "model: {source: some/model}\ndata: {sources: [{path: data/tickets.jsonl}]}\ntrain: {learnin_rate: 1.0e-4}\n"
    )
    done = dry_run(folder, "--configfile", "my.yaml")
    text = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in text
    assert "train.learnin_rate: unknown setting; did you mean `learning_rate`?" in text
    assert not (folder / "results").exists()


def test_a_length_above_the_models_context_is_refused_before_any_job(folder, tiny_model_dir):
    (folder / "my.yaml").write_text(
        f"model: {{source: {tiny_model_dir}}}\n"
        "data: {sources: [{path: data/tickets.jsonl}]}\nlengths: {max_seq_length: 4096}\n"
    )
    done = dry_run(folder, "--configfile", "my.yaml")
    text = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in text
    assert "lengths.max_seq_length: 4096 is above the model's context, 512 tokens (run default)" in text
