"""The story of a run as the terminal tells it: a line for each stage that has ended, errors once, the verdict last."""

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adder.core.display.status import StageStatus, read_status, status_file
from adder.core.display.text import one_line, shortened, width
from adder.core.progress import duration
from adder.core.stage_spec import StageSpec, figures
from adder.workflow.stage_runner import read_record
from adder.workflow.terminal import plan, snakemake_text
from adder.workflow.terminal.closing import closing_lines
from adder.workflow.terminal.job_stderr import last_words
from adder.workflow.terminal.outlook import Outlook
from adder.workflow.terminal.screen import Screen

LABEL = 18  # columns that a stage's name has at least, and
MOST_LABEL = 30  # at most
TIME = 9  # columns
BAR = 16
NARROW = 70  # columns, below which lines have less beside their text
FULL = 1 << 20  # bytes
HIDDEN = "link"  # its results are what stands last
OUT_OF_MEMORY = "killed by SIGKILL, which is mostly the machine's memory running out"


@dataclass
class Job:
    """A job that runs or ran.

    folder: of the stage, below the results; None for what isn't one. is_shown: whether it gets a line.
    """

    label: str
    folder: str | None
    log: Path | None
    began: float
    is_shown: bool


@dataclass
class Story:
    """What has happened so far.

    stages: whether stages get lines; closing: whether the end does. is_plan: whether nothing runs, as with -n.
    """

    screen: Screen
    stages: bool = True
    closing: bool = True
    is_plan: bool = False
    began: float = field(default_factory=time.time)
    jobs: dict[int, Job] = field(default_factory=dict)
    running: dict[int, Job] = field(default_factory=dict)
    failed: dict[str, Job] = field(default_factory=dict)
    untold: list[str] = field(default_factory=list)
    noticed: set[str] = field(default_factory=set)
    nothing_to_do: bool = False
    stopped: bool = False
    outlook: Outlook | None = None
    jobs_wrote: Path | None = None
    """Where what jobs wrote to standard error by themselves is."""

    def job_begins(self, number: int, message: str, output: str, log: Path | None, reason: str = "") -> None:
        """A job has been started, or handed to a cluster; with -n, it would be. `reason`: Snakemake's."""
        folder, known = plan.stage_of(output), plan.current()
        if known is not None and folder in known.stages:
            label = known.label(folder)
        else:
            folder, label = None, message
        if self.is_plan:
            if output and number not in self.jobs:
                self.jobs[number] = Job(one_line(label), folder, log, time.time(), True)
                if self.stages:
                    self._stage_line("planned", self.jobs[number], None, snakemake_text.reason(reason))
            return
        if log is not None:  # what an earlier job there has said isn't of this one
            with contextlib.suppress(OSError):
                status_file(log).unlink(missing_ok=True)
        with self.screen.lock:
            if not self.jobs:
                self._begin(known)
            is_shown = bool(output) and not label.startswith(HIDDEN)
            self.jobs[number] = self.running[number] = Job(one_line(label), folder, log, time.time(), is_shown)

    def job_done(self, number: int) -> None:
        """A job has gone well."""
        with self.screen.lock:
            job = self.running.pop(number, None)
            if job is not None and self.stages and job.is_shown:
                self._stage_line("done", job, *self._result(job))
                self._notices(job)

    def job_failed(self, number: int, why: str) -> None:
        """A job has failed; `why` is what Snakemake says of it."""
        with self.screen.lock:
            job = self.running.pop(number, None) or self.jobs.get(number)
            if job is None:
                self.error(why)
                return
            if job.label in self.failed:
                return
            self.failed[job.label] = job
            self._notices(job)
            self._stage_line("failed", job, time.time() - job.began, self._reason(job, why))
            self.untold.clear()

    def error(self, text: str) -> None:
        """Snakemake has an error to tell. What only says that a job has failed waits until it is known which."""
        if snakemake_text.is_of_failed_job(text):
            self.untold.append(text)
        else:
            self._problem(snakemake_text.sentence(text), "failed")

    def warning(self, text: str) -> None:
        """Snakemake warns."""
        if self.stages:
            self._problem(text, "notice")

    def say(self, text: str) -> None:
        """Show a sentence."""
        self.screen.line(text)

    def draw(self, now: float) -> None:
        """Bring the live line up to date."""
        with self.screen.lock:
            self.screen.live(self._live(now) if self.running and self.stages else "")

    def close(self) -> None:
        """Snakemake is through."""
        self.screen.live("")
        if self.untold and not self.failed and not self.stopped:
            self._problem(snakemake_text.sentence(self.untold[0]), "failed")
        known = plan.current()
        if self.is_plan:
            if self.closing:
                self._planned(known)
        elif self.stopped and self.jobs:
            self.screen.line("Stopped; the same command goes on from here.")
        elif self.failed:
            self._failures(known)
        elif known is not None and self.closing and (self.jobs or self.nothing_to_do):
            self._closing(known)

    def _begin(self, known: "plan.Plan | None") -> None:
        if known is None or not known.jobs or not self.stages:
            return
        self.outlook = Outlook.of(known)
        runs = f"run {known.runs[0]}" if len(known.runs) == 1 else f"{len(known.runs):,} runs"
        parts = [f"{one_line(runs)}: {len(known.jobs):,} stage{'s' * (len(known.jobs) != 1)} to run"]
        if ready := len(known.stages) - len(known.jobs):
            parts.append(f"{ready:,} finished before")
        left = self.outlook.left({}, self.began)
        if left.is_learnt:
            parts.append(f"about {duration(left.seconds)} by earlier runs")
        self.screen.line(", ".join(parts), colour="strong")

    def _planned(self, known: "plan.Plan | None") -> None:
        if self.nothing_to_do:
            self.screen.line("Nothing to be done: everything that was asked for is there.")
        elif self.jobs:
            text = f"{len(self.jobs):,} job{'s' * (len(self.jobs) != 1)} would run"
            if known is not None:
                known.jobs = [job.folder for job in self.jobs.values() if job.folder is not None]
                left = Outlook.of(known).left({})
                text += f", for about {duration(left.seconds)} by earlier runs" if left.is_learnt else ""
            self.screen.line(f"{text}; with -n nothing has.")

    def _stage_line(self, mark: str, job: Job, seconds: float | None, text: str) -> None:
        known = plan.current()
        names = [known.label(folder) for folder in known.jobs or known.stages] if known is not None else []
        room = min(max([LABEL, *map(len, names)]), MOST_LABEL)
        if self.screen.columns is not None and self.screen.columns < NARROW:
            room = 14
        label = shortened(job.label, room)
        colour = {"done": "good", "failed": "bad", "planned": "faint"}[mark]
        lead = f"  {self.screen.coloured(self.screen.marks[mark], colour)} {label}{' ' * (room - width(label))} "
        if seconds is not None:
            lead += f"{duration(seconds):>{TIME}}  "
        hanging = room + 5 + (TIME + 2 if seconds is not None else 0)
        self.screen.line(text, hanging=hanging, lead=lead, colour="bad" if mark == "failed" else None)

    def _result(self, job: Job) -> tuple[float, str]:
        """Seconds that a job took, and what came out of it."""
        if self.outlook is not None and job.folder is not None:
            self.outlook.finished(job.folder)
        known, took = plan.current(), time.time() - job.began
        record = read_record(known.results / job.folder) if known is not None and job.folder is not None else None
        if record is None or known is None or job.folder is None:
            return took, one_line(self._status(job).text)
        found = result(known.stages[job.folder].spec, record["summary"])
        return (took, f"restored: {found}") if record["restored"] else (record["seconds"], found)

    def _notices(self, job: Job) -> None:
        for text in self._status(job).notices:
            if text in self.noticed:  # of another run of a sweep
                continue
            self.noticed.add(text)
            self._problem(text.removeprefix("warning: "), "notice")

    def _problem(self, text: str, mark: str) -> None:
        colour = "bad" if mark == "failed" else "warning"
        lead = f"  {self.screen.coloured(self.screen.marks[mark], colour)} "
        self.screen.line(text, hanging=4, lead=lead, colour=colour)

    def _reason(self, job: Job, why: str) -> str:
        if said_itself := self._status(job).error:
            return said_itself
        if self.stopped:
            return "stopped"
        signal = next(filter(None, map(snakemake_text.killed_by, self.untold)), None)
        found = OUT_OF_MEMORY if signal == "SIGKILL" else f"killed by {signal}" if signal else ""
        said = [text for text in (found, snakemake_text.sentence(why)) if text]
        known = plan.current()
        if not said and known is not None and is_full(known.results):
            return f"the disk of {known.results}/ has no room left: make room, then the same command goes on"
        if not said and self.jobs_wrote is not None and (last := last_words(self.jobs_wrote)):
            said = [f"{one_line(last)} (more in {self.jobs_wrote})"]
        log = f"its log is {job.log}" if job.log is not None else ""
        return "; ".join([*(said or ["failed without saying why"]), *filter(None, [log])])

    def _failures(self, known: "plan.Plan | None") -> None:
        if known is None or not self.closing:
            return
        over = {job.folder for job in self.jobs.values()} - {job.folder for job in self.running.values()}
        left = len(set(known.jobs) - over)
        waiting = f"; {left:,} stages that need it were not run" if left > 0 else ""
        self.screen.line(f"Failed: {', '.join(self.failed)}{waiting}. Once that is mended, the same command goes on.")
        if len(known.runs) > 1:
            self._closing_lines(known)

    def _closing(self, known: "plan.Plan") -> None:
        if self.jobs and self.stages:
            self.screen.line(f"Done in {duration(time.time() - self.began)}.")
        elif self.nothing_to_do:
            self.screen.line("Nothing to do: everything that was asked for is there.")
        self._closing_lines(known)

    def _closing_lines(self, known: "plan.Plan") -> None:
        lines = list(closing_lines(known.runs, known.results))
        room = max([6, *(width(line.head) for line in lines)])
        for line in lines:
            if line.head:
                self.screen.line(line.text, hanging=room + 4, lead=f"  {line.head}")
            else:
                self.screen.line(line.text, colour="strong")

    def _live(self, now: float) -> str:
        job = next(reversed(self.running.values()))
        if self.stopped:
            return f"  stopping {job.label}"
        statuses = {one.folder: self._status(one) for one in self.running.values() if one.folder is not None}
        status = self._status(job)
        more = f" and {len(self.running) - 1} more" if len(self.running) > 1 else ""
        known = plan.current()
        if known is not None and known.at_once > 1 and not status.began:
            text = f"{job.label}{more}: waiting for the cluster"
        else:
            text = f"{job.label}{more}, {duration(now - (status.began or job.began))}"
        if told := one_line(status.text):
            text += f": {told}"
        if self.outlook is None:
            return f"  {text}"
        left = self.outlook.left(statuses, now)
        if not left.is_known:
            return f"  {len(self.outlook.done)} of {len(self.outlook.plan.jobs)} stages · {text}"
        share = (now - self.began) / max(now - self.began + left.seconds, 1e-9)
        head = f"{100 * share:3.0f} %, about {rounded(left.seconds)} left"
        if (self.screen.columns or 0) >= NARROW:
            filled = round(share * BAR)
            head = f"{'█' * filled}{'░' * (BAR - filled)} {head}"
        return f"  {head} · {text}"

    def _status(self, job: Job) -> StageStatus:
        return read_status(status_file(job.log)) if job.log is not None else StageStatus()


def result(spec: StageSpec, summary: Mapping[str, Any]) -> str:
    """What came out of a stage, one sentence. A summary of another version of the stage is shown as it is."""
    try:
        return one_line(spec.result(summary))
    except (KeyError, TypeError, ValueError):
        return one_line(figures(summary))


def rounded(seconds: float) -> str:
    """A duration that doesn't pretend to know the second."""
    step = 60 if seconds >= 600 else 10 if seconds >= 60 else 5
    return duration(max(round(seconds / step), 1) * step)


def is_full(place: Path) -> bool:
    """Whether a disk has no room for the little that a job would have said."""
    try:
        return shutil.disk_usage(place).free < FULL
    except OSError:
        return False
