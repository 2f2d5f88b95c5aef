"""A copy of the workflow to try changes on, with a tiny model, and what Snakemake makes of each change."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from adder.settings import merged

ROOT = Path(__file__).resolve().parents[2]
# What a job is called in the table of docs/caching.md, by Snakemake's rule.
STAGES = {
    "download_model": "model",
    "download_data": "data",
    "format_data": "format",
    "tokenize_data": "tokenize",
    "choose_lengths": "lengths",
    "train_adapter": "train",
    "merge_adapter": "merge",
    "evaluate_model": "evaluate",
    "write_report": "report",
}


class Project:
    """The workflow in a folder of its own; `config` is written to config/config.yaml before each command."""

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, config
        for name in ("Snakefile", "rules", "workflow_scripts", "profiles", "envs"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            options = {"ignore": shutil.ignore_patterns("__pycache__")} if source.is_dir() else {}
            copy(source, folder / name, **options)
        (folder / "config").mkdir()

    def snakemake(self, *arguments: str, config: dict | None = None, check: bool = True) -> subprocess.CompletedProcess:
        """Run snakemake on the configuration, laid over by `config`; return its output."""
        values = merged(self.config, config or {})
        (self.folder / "config" / "config.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "1"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=600)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
        return done

    def run(self, *targets: str, config: dict | None = None) -> dict[str, str]:
        """Run the workflow; return {stage: "ran" or "restored"} for the stages that had a job."""
        done = self.snakemake(*(targets or ("merged_model",)), config=config)
        found = {}
        for line in (done.stdout + done.stderr).splitlines():
            match = re.match(r"(\w+): (done in|restored from)", line)
            if match:
                found[match[1]] = "ran" if match[2] == "done in" else "restored"
        return found

    def planned(self, config: dict | None = None, *targets: str) -> dict[str, int]:
        """Dry-run the workflow; return how many jobs each stage has."""
        done = self.snakemake(*(targets or ("merged_model",)), "-n", config=config)
        rows = re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, flags=re.MULTILINE)
        return {STAGES[name]: int(count) for name, count in rows if name in STAGES}

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace `old` by `new` in one file of the copy; `old` must be there."""
        file = self.folder / path
        text = file.read_text()
        assert old in text, f"{old!r} is not in {path}"
        file.write_text(text.replace(old, new, 1))

    def result(self, page: str, run: str = "default"):
        """Read a JSON page of a run's results."""
        return json.loads((self.folder / "results" / run / page).read_text())


def write_rows(path: Path, count: int, start: int = 0) -> None:
    """Question-answer rows whose answers are short JSON objects."""
    items = ("kettle", "lamp", "desk", "chair", "phone")
    with path.open("a") as file:
        for i in range(start, start + count):
            item = items[i % len(items)]
            row = {"prompt": f"My {item} number {i} broke.", "completion": json.dumps({"item": item, "number": i})}
            file.write(json.dumps(row) + "\n")
