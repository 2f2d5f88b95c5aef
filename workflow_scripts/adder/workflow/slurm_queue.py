"""Slurm's queue as the submit host sees it: what can't be had there, what waits and why, what runs where.

Only Slurm's own commands are called. How Snakemake's executor is held to it is in rules/slurm.smk.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from adder.core.errors import UserError
from adder.workflow.slurm_job import seconds

# What passes by itself, such as a node that is being rebooted: a job waits for it.
PASSING = ("not available (down, drained or reserved)", "not available now", "nodes are busy")
# Why a job waits that will wait for ever.
NEVER = re.compile(
    r"PartitionConfig|PartitionTimeLimit|PartitionNodeLimit|BadConstraints|AccountNotAllowed|InvalidAccount|InvalidQOS"
    r"|QOSNotAllowed|(Assoc|QOS)Max\w+PerJob\w*|QOSMinGRES|ReservationDeleted"
)
OVER = ("COMPLETED", "COMPLETING", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue. comment: what Snakemake's plugin writes there, the rule and its wildcards."""

    id: str
    name: str
    state: str
    reason: str
    node: str
    comment: str

    @property
    def is_over(self) -> bool:
        """Whether it neither waits nor runs any more."""
        return self.state in OVER

    @property
    def runs(self) -> bool:
        """Whether it has a node."""
        return self.state == "RUNNING"

    def __str__(self) -> str:
        where = f"runs on {self.node}" if self.runs else self.state.lower().replace("_", " ")
        if self.state == "PENDING" and self.reason != "None":
            where += f": {self.reason}"
        return f"Slurm job {self.id} ({self.comment.removeprefix('rule_').replace('_wildcards_', ' ')}, {where})"


def my_jobs() -> list[QueuedJob]:
    """All jobs of this user that the controller knows. Raises UserError where it can't be asked."""
    rows = _run("squeue", "--me", "--noheader", "--states=all", "--format=%i|%j|%T|%r|%N|%k").splitlines()
    return [QueuedJob(*row.split("|", 5)) for row in rows if row.count("|") >= 5]


def run_name(results: Path, code: Iterable[Path]) -> tuple[str, str]:
    """(name, prefix) of all jobs that write to `results`; the name changes with the files of the `code` that they run.

    So a later start finds the jobs of an earlier one, and knows whether they run what it would run.
    """
    place = hashlib.blake2b(str(results.resolve()).encode(), digest_size=6).hexdigest()
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(set(code)):
        digest.update(path.read_bytes())
    return f"adder-{place}-{digest.hexdigest()}", f"adder-{place}-"


def left_behind(name: str, prefix: str) -> dict[str, QueuedJob]:
    """Running jobs of an earlier start, by comment; those that wait are cancelled: they may be asked for otherwise now.

    Raises UserError for running ones of other code.
    """
    jobs = [job for job in my_jobs() if job.name.startswith(prefix) and not job.is_over]
    if other := [job for job in jobs if job.runs and job.name != name]:
        ids = " ".join(job.id for job in other)
        raise UserError(
            f"{', '.join(map(str, other))}: started by other code than this, and still at work; wait for it, or end it "
            f"by `scancel {ids}`"
        )
    cancel([job.id for job in jobs if not job.runs])
    return {job.comment: job for job in jobs if job.runs}


def cancel(ids: Iterable[str]) -> None:
    """End jobs; such as have ended are none of it."""
    if ids := list(ids):
        _run("scancel", *ids)


def cancel_all(name: str) -> None:
    """End every job of this name, also one whose number nobody has noted yet."""
    cancel(job.id for job in my_jobs() if job.name == name and not job.is_over)


@dataclass(frozen=True)
class Wanted:
    """What a rule's job asks for. mb: None where it isn't known yet, before the model is there."""

    rule: str
    account: str
    partition: str
    cpus: int
    gpus: int
    mb: int | None
    minutes: int

    @classmethod
    def of(cls, rule: str, cpus: int, resources: Mapping[str, Any]) -> Self:
        """What Snakemake's resources of a job stand for."""
        mb = resources.get("mem_mb")
        return cls(
            rule=rule,
            account=str(resources.get("slurm_account") or ""),
            partition=str(resources.get("slurm_partition") or ""),
            cpus=cpus,
            gpus=int(resources.get("gpu") or 0),
            mb=mb if isinstance(mb, int) else None,
            minutes=int(resources.get("runtime") or 0),
        )

    def __str__(self) -> str:
        parts = (
            (self.account, f"account {self.account}"),
            (self.partition, f"partition {self.partition}"),
            (self.cpus, f"{self.cpus} CPU{'s' * (self.cpus > 1)}"),
            (self.gpus, f"{self.gpus} GPU{'s' * (self.gpus > 1)}"),
            (self.mb, f"{self.mb} MB"),
            (self.minutes, f"{self.minutes} minutes"),
        )
        return f"{self.rule} ({', '.join(text for there, text in parts if there)})"


def refuse_impossible(call: str, wanted: Wanted) -> None:
    """Raise UserError, in Slurm's words, where it can't take what an sbatch `call` asks for. Nothing is submitted.

    call: the shell's text, up to what is to be run.
    """
    known = call.replace(" --mem <TBD>", "")  # of a model that isn't there yet
    done = subprocess.run(f"{known} --test-only --wrap=true", shell=True, capture_output=True, text=True, check=False)
    reason = None
    if done.returncode and not any(part in done.stderr for part in PASSING):
        last = (done.stderr.strip() or f"sbatch ended with status {done.returncode}").splitlines()[-1]
        reason = re.sub(r"^(sbatch: error: |allocation failure: )+", "", last)
    elif (longest := _longest_minutes(wanted.partition)) is not None and wanted.minutes > longest:
        # Taken all the same, to wait for ever.
        reason = f"the partition gives a job {longest:g} minutes at most"
    if reason:
        raise UserError(
            f"Slurm can't take {wanted}: {reason}; set what your cluster has in the profile, or for this rule by "
            f"--set-resources {wanted.rule}:…"
        )


def _longest_minutes(partition: str) -> float | None:
    """The longest time that a job may have; None where there is no limit."""
    if not partition:
        return None
    limits = [seconds(row) for row in _run("sinfo", "-h", "-p", partition, "-o", "%l").splitlines()]
    known = [limit / 60 for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


class NodeNames(set[str]):
    """Nodes that were lost, to be excluded from then on.

    Snakemake's plugin also adds what `sacct` says of a job that is back in the queue, "None assigned". With that among
    them, sbatch takes no job any more.
    """

    def add(self, element: str) -> None:
        """Add a node, or a list of them as Slurm writes it."""
        if re.fullmatch(r"[\w.,\[\]-]+", element):
            super().add(element)


@dataclass
class Watch:
    """Tells what becomes of jobs: in the queue and why, on which node, and what their stages say meanwhile.

    name: of the jobs. logs: (job) to the file that Slurm writes of it. speakers: what a stage's lines begin with.
    """

    name: str
    logs: Callable[[QueuedJob], Path]
    speakers: tuple[str, ...]
    tell: Callable[[str], object]
    interval: float
    _told: dict[str, str] = field(default_factory=dict)
    _logs: dict[str, BinaryIO] = field(default_factory=dict)
    _heard: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Watch, in a thread of its own, for as long as this process lives."""
        threading.Thread(target=self._watch, daemon=True, name="watch of Slurm's queue").start()

    def _watch(self) -> None:
        while True:
            time.sleep(self.interval)
            with contextlib.suppress(UserError):  # the controller is busy; Snakemake itself tells what lasts
                self.look()

    def look(self) -> None:
        """Tell what has changed since the last look."""
        for job in my_jobs():
            if job.name != self.name:
                continue
            story = f"{job.state} {job.reason if job.state == 'PENDING' else job.node}"
            if self._told.get(job.id) != story and (job.id in self._told or not job.is_over):
                self.tell(self._sentence(job))
            self._told[job.id] = story
            if job.state == "PENDING" and NEVER.fullmatch(job.reason):
                self.tell(f"Slurm job {job.id} would wait for ever ({job.reason}): cancelled")
                cancel([job.id])
            self._pass_on(job)

    def _sentence(self, job: QueuedJob) -> str:
        return f"{job}; log: {self.logs(job)}" if job.runs else str(job)

    def _pass_on(self, job: QueuedJob) -> None:
        """Show what a stage has said since the last look."""
        if job.id in self._heard:
            return
        # Kept open: the plugin removes the log of a job that has gone well, perhaps before this looks again.
        path, file = self.logs(job), self._logs.get(job.id)
        try:
            if file is None or (path.exists() and not os.path.samestat(os.fstat(file.fileno()), path.stat())):
                file = self._logs[job.id] = path.open("rb")
        except OSError:  # not begun yet
            return
        if os.fstat(file.fileno()).st_size < file.tell():  # begun anew by a job that was put back into the queue
            file.seek(0)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        file.seek(len(whole) - len(text), os.SEEK_CUR)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(self.speakers):
                self.tell(line)
        if job.is_over and job.state != "COMPLETING":
            file.close()
            self._heard.add(job.id)


async def pause(duration: float, wanted: Callable[[], bool]) -> None:
    """Sleep for so many seconds, as long as that is `wanted`."""
    until = time.monotonic() + duration
    while wanted() and time.monotonic() < until:
        await asyncio.sleep(0.2)


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip()
        raise UserError(f"{command[0]}: {told}") from None
