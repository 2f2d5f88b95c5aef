"""The runs of a sweep that have no result, each with why, and the comparison of those that have one."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from adder.core.display.status import read_status, status_file
from adder.core.display.text import one_line
from adder.workflow import requests, side_jobs
from adder.workflow.stage_graph import Stage
from adder.workflow.stage_runner import RECORD

NOT_RUN = "was not run to its end"


def unfinished(runs: Mapping[str, Mapping[str, Stage]], results: Path) -> dict[str, str]:
    """The runs whose report isn't there, and why, as far as a stage of theirs has said so."""
    return {run: _why(stages, results) for run, stages in runs.items() if not _is_finished(stages["report"], results)}


def compare_finished(runs: Mapping[str, Mapping[str, Stage]], results: Path) -> None:
    """Where only some runs of several have a report, compare these, and name the others in the comparison."""
    missing = unfinished(runs, results)
    if len(runs) < 2 or not missing or len(missing) == len(runs):
        return
    folders = {
        run: {name: results / stage.folder for name, stage in stages.items()}
        for run, stages in runs.items()
        if run not in missing
    }
    with contextlib.suppress(SystemExit):  # what is wrong is said by then, and the runs have failed in any case
        side_jobs.compare_runs(
            folders, results, requests.request_file(results, ".compare"), results / "logs" / "compare.log", missing
        )


def _is_finished(stage: Stage, results: Path) -> bool:
    return (results / stage.folder / RECORD).exists()


def _why(stages: Mapping[str, Stage], results: Path) -> str:
    for name, stage in stages.items():
        if not _is_finished(stage, results):
            log = results / "logs" / stage.name / f"{stage.key}.log"
            if error := read_status(status_file(log)).error:
                return one_line(f"{name.replace('_', ' ')}: {error}")
    return NOT_RUN
