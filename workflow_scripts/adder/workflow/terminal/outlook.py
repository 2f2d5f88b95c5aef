"""What is left of a run: seconds, by what runs, what is still to run and what earlier stages took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adder.core.display.status import StageStatus
from adder.core.stage_record import StageRecord
from adder.workflow.stage_runner import read_record
from adder.workflow.terminal.estimates import AROUND, Times, is_counted, this_machine, together
from adder.workflow.terminal.plan import Plan

LATE = 0.1  # of what a stage has taken, that it is given once it takes longer than was thought
SETTLED = 0.9  # share of the time that must be known from earlier stages


class Left(NamedTuple):
    """Seconds left, whether earlier stages on this machine tell so, and whether that can be said by now.

    It can't as long as the rows aren't tokenised, or nothing has shown how fast this machine is.
    """

    seconds: float
    is_learnt: bool
    is_known: bool


@dataclass
class Outlook:
    """The stages of a plan, of which those with a job that hasn't `finished` are left."""

    plan: Plan
    times: Times
    done: set[str] = field(default_factory=set)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, StageRecord] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> "Outlook":
        """The outlook at the start of a plan."""
        times = Times(this_machine() if plan.at_once == 1 else None)
        times.read(plan.results)
        settings = {folder: plan.stages[folder].stage.settings.model_dump(mode="json") for folder in plan.jobs}
        return cls(plan, times, settings=settings)

    def finished(self, folder: str) -> None:
        """A stage has finished, or failed."""
        self.done.add(folder)
        record = read_record(self.plan.results / folder)
        if record is not None:
            self.times.note(record)

    def left(self, running: Mapping[str, StageStatus], now: float | None = None) -> Left:
        """What is left. running: {folder: what it says} of the stages that run, or wait for a cluster."""
        now = time.time() if now is None else now
        seconds: dict[str, float] = {}
        learnt, all_counted = 0.0, True
        for folder in self.plan.jobs:
            if folder in self.done:
                continue
            above, names = self._above(folder)
            stage, settings = self.plan.stages[folder].stage.name, self.settings[folder]
            estimate, is_learnt = self.times.estimate(stage, settings, above, names)
            all_counted = all_counted and (is_learnt or is_counted(stage, settings, above))
            if folder in running:
                seconds[folder], told = _of_running(estimate, running[folder], now)
                is_learnt = is_learnt or told
            else:
                seconds[folder] = estimate + AROUND
            learnt += seconds[folder] * is_learnt
        parents = {
            folder: [above.folder for above in planned.stage.parents.values()]
            for folder, planned in self.plan.stages.items()
        }
        whole = together(seconds, parents, self.plan.at_once)
        is_learnt = learnt >= SETTLED * sum(seconds.values())
        shown = self.times.has_computed or any(status.left is not None for status in running.values())
        return Left(whole, is_learnt, all_counted and (is_learnt or shown))

    def _above(self, folder: str) -> tuple[dict[str, Mapping[str, Any]], set[str]]:
        """The summaries of the finished stages above one, by their names, and the names of all above it."""
        stage = self.plan.stages[folder].stage
        above: dict[str, Mapping[str, Any]] = {}
        for place, parent in stage.family().items():
            if place != folder and (record := self._record(place)) is not None:
                above[parent.name] = record["summary"]
        # What the tuned model is known by is there before the stage itself is.
        names = {parent.name for place, parent in stage.family().items() if place != folder}
        return above, names

    def _record(self, folder: str) -> StageRecord | None:
        if folder not in self.records and (folder not in self.plan.jobs or folder in self.done):
            record = read_record(self.plan.results / folder)
            if record is not None:
                self.records[folder] = record
        return self.records.get(folder)


def _of_running(estimate: float, status: StageStatus, now: float) -> tuple[float, bool]:
    """Seconds that a running stage has left, and whether it says so itself."""
    if status.left is not None:
        return max(status.left - (now - status.at), 1.0), True
    taken = now - (status.began or now)
    return max(estimate + AROUND - taken, LATE * taken), False
