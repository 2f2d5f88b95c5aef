"""The workflow in a folder of its own, started as people do on a cluster: with the shipped profile."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from project import Project
from slurm_cluster import ACCOUNT, Cluster

PROFILE = "profiles/slurm/config.yaml"


class Started:
    """A Snakemake that submits jobs; what it shows is in `file`."""

    def __init__(self, project: "SlurmProject", *arguments: str, **variables: str):
        self.project, self.file = project, project.folder / f"shown-{len(project.started)}.txt"
        command = [sys.executable, "-m", "snakemake", "merged_model", "--profile", "profiles/slurm", *arguments]
        environment = {name: value for name, value in project.environment.items() if not name.startswith("SLURM")}
        with self.file.open("w") as out:
            # Heeds Ctrl-C also where the tests run in the background, which ignores it.
            self.process = subprocess.Popen(
                command,
                cwd=project.folder,
                env=environment | variables,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def shown(self) -> str:
        return self.file.read_text()

    def until(self, there: Callable[[], object], what: str) -> None:
        """Wait until something is there; the workflow must not end before."""
        until(lambda: there() or self.process.poll() is not None, lambda: f"{what}:\n{self.shown}")
        assert there(), f"it ended before {what}:\n{self.shown}"

    def ends(self, status: int, seconds: float = 900.0) -> str:
        """Wait for its end; what it has shown."""
        try:
            assert self.process.wait(timeout=seconds) == status, self.shown
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it doesn't end:\n{self.shown}") from None
        return self.shown

    def kill(self) -> None:
        """As when its host is lost: nothing of it can say a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class SlurmProject(Project):
    """A project on a `cluster`. In its profile are an account and two partitions, and what makes tests quicker."""

    def __init__(self, folder: Path, config: dict, cluster: Cluster):
        super().__init__(folder, config)
        self.cluster, self.started = cluster, []
        self.profile = (folder / PROFILE).read_text()
        self.write_profile()

    def write_profile(self, account: str = ACCOUNT, partition: str = "gpu") -> None:
        """Set the three lines that are everybody's own."""
        text = self.profile.replace("\"'default'\"", f"\"'{account}'\"").replace("\"'gpu'\"", f"\"'{partition}'\"")
        assert text.count(f"'{account}'") == text.count(f"'{partition}'") == text.count("\"'cpu'\"") == 1
        (self.folder / PROFILE).write_text(text.replace("checks: 10", "checks: 1"))

    def start(self, *arguments: str, config: dict | None = None, **variables: str) -> Started:
        """Start the workflow."""
        self.configure(config)
        self.started.append(Started(self, *arguments, **variables))
        return self.started[-1]

    def job(self, rule: str) -> dict[str, str]:
        """The job of a rule that waits or runs, as Cluster.jobs has it; an empty one where there is none."""
        return next((job for job in self.cluster.jobs() if job["comment"].startswith(f"rule_{rule}_")), {})

    def asked(self) -> dict[str, dict[str, str]]:
        """What Slurm was asked for by the last job of each rule: sacct's fields, and `tres` by name."""
        fields = ("Comment", "JobID", "ReqCPUS", "Timelimit", "Partition", "Account", "ReqTRES", "State")
        rows = self.cluster.command("sacct", "-n", "-X", "-P", "-S", "now-1day", "-o", ",".join(fields)).splitlines()
        found = {}
        for row in rows:
            job = dict(zip(fields, row.split("|"), strict=True))
            if match := re.fullmatch(r"rule_(\w+?)_wildcards_\w+", job["Comment"]):
                found[match[1]] = job | dict(part.split("=") for part in job["ReqTRES"].split(","))
        return found

    def checkpoints(self) -> list[Path]:
        """The finished checkpoints of trainings that are at work."""
        return sorted((self.folder / "results").glob("checkpoints/*/checkpoint-*/seal.json"))

    def train_record(self) -> dict:
        """The record of the run's training."""
        page = yaml.safe_load((self.folder / "results" / "default" / "run.yaml").read_text())
        return yaml.safe_load(
            (self.folder / "results" / "stages" / "train" / page["stages"]["train"]["key"] / "stage.json").read_text()
        )

    def end_all(self) -> None:
        """End what a test that failed has left."""
        for started in self.started:
            if started.process.poll() is None:
                started.kill()


def until(there: Callable[[], object], what: Callable[[], str], seconds: float = 900.0) -> None:
    """Wait until something is there. Raises AssertionError, which says what wasn't, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"there is still no {what()}"
        time.sleep(0.2)
