"""A copy of the workflow to try changes on, with a tiny model, and what Snakemake makes of each change."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from filelock import FileLock

from adder.core.files import read_json, write_json
from adder.workflow.settings import merged
from adder.workflow.stages import SPECS

ROOT = Path(__file__).resolve().parents[1]
# What a job is called in the table of docs/caching.md, by Snakemake's rule.
STAGES = {spec.rule: spec.name for spec in SPECS.values()}
TINY = {
    "model": {"source": "model"},
    "data": {"sources": [{"path": "rows.jsonl"}], "heldout": {"share": 0.2}},
    "train": {"epochs": 1, "lora_r": 4, "eval_samples": 2, "compute_dtype": "float32"},
    "evaluate": {"max_new_tokens": 8},
}
# Another run of it, at a rate at which the replies become others than the base's.
OTHER = {"train": {"learning_rate": 0.05}}


class Project:
    """The workflow in a folder of its own; `config` is written to config/config.yaml before each command.

    What a folder already has of it is taken as it is.
    """

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, config
        if (folder / "Snakefile").exists():
            return
        # With what Python and the workflow keep of the sources, but for what another process is just writing.
        unfinished = shutil.ignore_patterns("*.pyc.*", "*.partial")
        for name in ("Snakefile", "rules", "workflow_scripts", "profiles", "envs"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            options = {"ignore": unfinished} if source.is_dir() else {}
            copy(source, folder / name, **options)
        (folder / "config").mkdir()

    def configure(self, config: dict | None = None) -> Path:
        """Write the configuration, laid over by `config`; return its file."""
        path = self.folder / "config" / "config.yaml"
        path.write_text(yaml.safe_dump(merged(self.config, config or {})))
        return path

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the package of the copy in place of the installed one."""
        return os.environ | {"PYTHONPATH": str(self.folder / "workflow_scripts")}

    def python(
        self, *arguments: str, variables: dict[str, str] | None = None, **options
    ) -> subprocess.CompletedProcess:
        """Run Python in the project's folder, with its package; both of its outputs are in `stdout`."""
        environment = self.environment | (variables or {})
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, timeout=600, **streams, **options)

    def snakemake(self, *arguments: str, config: dict | None = None) -> str:
        """Run snakemake on the configuration, laid over by `config`; return its own output. It must succeed."""
        self.configure(config)
        done = self.python("-m", "snakemake", *arguments, "--cores", "1", "--logger-adder-plain")
        assert done.returncode == 0, done.stdout
        return done.stdout

    def run(self, *targets: str, config: dict | None = None) -> dict[str, str]:
        """Run the workflow; return {stage: "ran" or "restored"} for the stages that had a job."""
        found = {}
        for line in self.snakemake(*(targets or ("merged_model",)), config=config).splitlines():
            match = re.match(r"(\w+): (done in|restored from)", line)
            if match:
                found[match[1]] = "ran" if match[2] == "done in" else "restored"
        return found

    def planned(self, config: dict | None = None, *targets: str) -> dict[str, int]:
        """Dry-run the workflow; return how many jobs each stage has."""
        shown = self.snakemake(*(targets or ("merged_model",)), "-n", config=config)
        rows = re.findall(r"^(\w+) +(\d+)$", shown, flags=re.MULTILINE)
        return {STAGES[name]: int(count) for name, count in rows if name in STAGES}

    def result(self, page: str, run: str = "default"):
        """Read a JSON page of a run's results."""
        return json.loads((self.folder / "results" / run / page).read_text())


class FirstRun:
    """A run of TINY to its report, and then one of OTHER, from nothing; `stages`: what the first did, as Project.run.

    It takes a minute, so the processes that run tests share one in the folder `shared`, and change copies of it.
    """

    def __init__(self, shared: Path):
        self.folder, told = shared / "first-run", shared / "first-run.json"
        with FileLock(shared / "first-run.lock"):
            if not told.exists():
                self._make(told)
        self.stages: dict[str, str] = read_json(told)

    def _make(self, told: Path) -> None:
        from tiny import save_tiny_model

        self.folder.mkdir()
        project = Project(self.folder, TINY)
        save_tiny_model(self.folder / "model")
        write_rows(self.folder / "rows.jsonl", 60)
        stages = project.run()
        project.run(config=OTHER)
        project.run()  # the results show the first
        write_json(told, stages)

    def copy(self, folder: Path) -> Project:
        """The project as it is after these runs, in the empty `folder`; links between its files stay such."""
        subprocess.run(["cp", "-a", f"{self.folder}/.", str(folder)], check=True)
        return Project(folder, TINY)

    def copy_cache(self, results: Path) -> None:
        """What any project that runs the same restores its stages from, below its folder `results`."""
        shutil.copytree(self.folder / "results" / "cache", results / "cache")


def write_rows(path: Path, count: int, start: int = 0) -> None:
    """Question-answer rows whose answers are short JSON objects."""
    items = ("kettle", "lamp", "desk", "chair", "phone")
    with path.open("a") as file:
        for i in range(start, start + count):
            item = items[i % len(items)]
            row = {"prompt": f"My {item} number {i} broke.", "completion": json.dumps({"item": item, "number": i})}
            file.write(json.dumps(row) + "\n")
