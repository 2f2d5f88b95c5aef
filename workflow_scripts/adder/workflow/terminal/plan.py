"""What a Snakemake has before it, as the Snakefile tells it to the logger plugin in the same process."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adder.core.stage_spec import StageSpec
from adder.workflow.stage_graph import Stage

STAGE_RECORD = re.compile(r"stages/\w+/[0-9a-f]{12}(?=/stage\.json$)")


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the configuration: what people know it by, the runs that it is of, the folders that it reads."""

    spec: StageSpec
    stage: Stage
    name: str
    runs: tuple[str, ...]


@dataclass
class Plan:
    """All stages of the configuration by their folder below `results`, and those of them that have a job."""

    results: Path
    runs: tuple[str, ...]
    stages: dict[str, PlannedStage]
    jobs: list[str] = field(default_factory=list)
    at_once: int = 1
    """Stages that can compute at the same time."""

    def label(self, folder: str) -> str:
        """What a line calls a stage: its name, and its run where the others have one of their own."""
        planned = self.stages[folder]
        name = planned.name.replace("_", " ")
        if len(planned.runs) == len(self.runs):
            return name
        first, *others = planned.runs
        return f"{name} {first}" + (f" +{len(others)}" if others else "")


# The jobs that aren't a stage, by their rules: what a line calls each.
SIDE_JOBS = {"link_run": "link", "check_guard": "guard", "push_run": "push", "compare_runs": "compare"}


def side_job(rule: str, run: str | None) -> str | None:
    """What a line calls the job of this rule, which an importing workflow may have given a prefix; None for others."""
    found = next((name for own, name in SIDE_JOBS.items() if rule == own or rule.endswith(f"_{own}")), None)
    several = _Announced.plan is not None and len(_Announced.plan.runs) > 1
    return f"{found} {run}" if found and run and several else found


class _Announced:
    plan: Plan | None = None
    on_begin: Callable[[Plan], object] | None = None


def announce(runs: Mapping[str, Mapping[str, Stage]], results: Path) -> None:
    """Let the terminal know the stages of each run, by the name under which the report knows them."""
    _Announced.plan = Plan(results, tuple(runs), planned_stages(runs))


def planned_stages(runs: Mapping[str, Mapping[str, Stage]]) -> dict[str, PlannedStage]:
    """All stages of the runs by their folder, each once."""
    first: dict[str, tuple[str, Stage]] = {}
    of_runs: dict[str, list[str]] = {}
    for run, own in runs.items():
        for name, stage in own.items():
            first.setdefault(stage.folder, (name, stage))
            of_runs.setdefault(stage.folder, []).append(run)
    return {
        folder: PlannedStage(stage.spec, stage, name, tuple(of_runs[folder])) for folder, (name, stage) in first.items()
    }


def begin(outputs: Iterable[str], at_once: int) -> None:
    """Let the terminal know which files will be made, and how many stages may compute at the same time."""
    if _Announced.plan is not None:
        found = (stage_of(path) for path in outputs)
        _Announced.plan.jobs = [folder for folder in found if folder in _Announced.plan.stages]
        _Announced.plan.at_once = at_once
        if _Announced.on_begin is not None:
            _Announced.on_begin(_Announced.plan)


def call_at_begin(action: Callable[[Plan], object] | None) -> None:
    """Have `action` called before the first job, in the thread that starts the jobs."""
    _Announced.on_begin = action


def current() -> Plan | None:
    """What was announced, if anything was."""
    return _Announced.plan


def stage_of(output: str) -> str | None:
    """The folder, below the results, of the stage whose record this output is; None where it is none."""
    found = STAGE_RECORD.search(output)
    return found[0] if found else None
