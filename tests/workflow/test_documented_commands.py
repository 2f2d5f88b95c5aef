"""Every command on the pages for people does what it says: run for real, or as a dry run where it would take long."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("adder", "snakemake", "make")
# What can't be had in a test, and what tests it instead.
ELSEWHERE = {
    "snakemake --cores 1 push": "tests/unit/export/test_hub_push.py",
    "snakemake merged_model --profile profiles/slurm": "tests/slurm/test_cluster.py",
    "adder stage vocabulary my.yaml": "tests/workflow/test_additions.py",
    "snakemake --lint": "make lint",
    "snakemake --sdm conda …": "conda isn't a requirement",
    "adder stage train my.yaml": "tests/unit/workflow/test_cli.py",
    "adder watch my.yaml": "tests/unit/workflow/test_watch.py",
    "adder serve results/default --port 8000": "tests/unit/serving/test_endpoint.py",
}


def commands() -> set[str]:
    """Commands of ours in code blocks, and in the text where they have more than one word; without comments."""
    found = set()
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
        lines += [
            line for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL) for line in block.split("\n")
        ]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines += [inline.replace("\n", " ") for inline in re.findall(r"`([^`]+)`", prose)]
        for line in lines:
            command = re.split(r"\s+#|\s*&&", line)[0].strip().removeprefix(".venv/bin/")
            if re.fullmatch(rf"({'|'.join(OURS)})( [^:(){{}}|]+)+", command):
                found.add(command)
    return found


COMMANDS = sorted(commands() - ELSEWHERE.keys())


def test_the_pages_have_commands_of_each_kind():
    for first in OURS:
        assert any(command.startswith(first) for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_knows_it(command):
    words = [word for word in shlex.split(command)[1:] if not word.startswith("CONFIG=")]
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(project):
    """The finished tiny run, with the files that the commands name."""
    for name in ("my.yaml", "other.yaml"):
        (project.folder / name).write_text(project.configure().read_text())
    own = project.folder / "my-folder"
    own.mkdir()
    for name in ("my.yaml", "rows.jsonl"):
        shutil.copy(project.folder / name, own / name)
    return project


TARGETS = {match[1] for command in COMMANDS if (match := re.fullmatch(r"snakemake --cores 1 (\w+)", command))}
OTHERS = [c for c in COMMANDS if c.startswith("snakemake ") and c.removeprefix("snakemake --cores 1 ") not in TARGETS]


def test_snakemake_knows_the_targets(folder):
    folder.snakemake(*sorted(TARGETS), "-n")


@pytest.mark.parametrize("command", OTHERS)
def test_snakemake_would_do_it(folder, command):
    words = shlex.split(command.replace("…/adder", str(folder.folder)))[1:]
    words += [] if "--report" in words or "-n" in words else ["-n"]
    done = folder.python("-m", "snakemake", *words, *(() if "--cores" in words else ("--cores", "1")))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("adder ")])
def test_adder_does_it(folder, command):
    words = shlex.split(command.replace("<run>", "default"))[1:]
    words += ["--help"] if len(words) == 1 else []  # named in passing
    done = folder.python("-m", "adder.workflow.cli", *words, input="")
    assert done.returncode == 0, done.stdout
