"""Asking Snakemake for what isn't what the configuration stands for, whatever it remembers of earlier runs.

Snakemake goes by time stamps and its own records, which are gone with `.snakemake`, and tell nothing of results that
were moved, written to or made by another clone. Each rule has a request among its inputs, a small file which is newer
than what the rule made wherever that must be made anew.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from adder.core.file_digests import FileDigests
from adder.core.files import atomic_write, read_json, write_json
from adder.core.stage_record import StageRecord
from adder.workflow import run_folder
from adder.workflow.code_digest import code_digest
from adder.workflow.stage_graph import Stage, reads
from adder.workflow.stage_runner import RECORD, broken_outputs, input_digests, other_by_now, read_record


def request_file(results: Path, name: str) -> Path:
    """Where the request of this name is."""
    return results / "cache" / "requests" / f"{name}.json"


def stage_request(stage: Stage) -> str:
    """Name of the request for a stage."""
    return f"{stage.name}-{stage.key}"


def ask(file: Path, wanted: object, made: Path | None) -> None:
    """Write the request `file` for what is `wanted`: newer than the file `made` by it, or old where that is None.

    What is asked for anew has another content each time: Snakemake takes a newer file of equal content for the old one.
    """
    if made is None:
        if _wanted(file) == wanted and file.stat().st_mtime == 0:
            return
        moment, content = 0.0, {"wanted": wanted}
    else:
        # The clock may have been put back since that was made.
        moment = max(time.time(), made.stat().st_mtime + 1 if made.exists() else 0.0)
        content = {"wanted": wanted, "asked": time.time_ns()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        write_json(partial, content)
        os.utime(partial, (moment, moment))


def ask_for_stages(results: Path, stages: Iterable[Stage], digests: FileDigests) -> list[str]:
    """Ask for each of the stages (parents before children) that isn't what its record or the configuration says.

    Returns a sentence for each file that isn't as its stage wrote it, or has read it beside what its settings name.
    """
    said: list[str] = []
    records: dict[str, StageRecord | None] = {}
    code = cache(code_digest)  # one for thousands of stages
    for stage in stages:
        folder = results / stage.folder
        record = records[stage.folder] = read_record(folder)
        problem = damage(folder, record, digests)
        if problem is not None:
            said.append(f"{problem}; the stage {stage.name} is made anew")
        others = other_by_now(record, digests) if record is not None else []
        said += [f"{file}: changed since it was read; the stage {stage.name} is made anew" for file in others]
        is_made = problem is None and not others and (record is None or _is_of(record, stage, records, code))
        ask(request_file(results, stage_request(stage)), stage.key, None if is_made else folder / RECORD)
    return said


def damage(folder: Path, record: StageRecord | None, digests: FileDigests) -> str | None:
    """What isn't as it was written in the folder of a finished stage, whose record this is; None where all is."""
    if record is None:
        return f"{folder / RECORD}: is damaged" if (folder / RECORD).exists() else None
    broken = broken_outputs(folder, record, digests)
    return f"{folder / broken[0]}: not as the stage wrote it" if broken else None


def _is_of(
    record: StageRecord, stage: Stage, records: Mapping[str, StageRecord | None], code: Callable[[str], str]
) -> bool:
    """Whether a finished stage was made by this code of what its parents are now.

    Of parents that aren't finished nothing is known; they come before it in any case.
    """
    if record["code"] != code(stage.spec.run):
        return False
    above = {name: records.get(parent.folder) for name, parent in stage.parents.items()}
    return all(
        parent is None or record["inputs"].get(name) == input_digests(parent, reads(stage.spec, name))
        for name, parent in above.items()
    )


def ask_for_run(results: Path, run: str, stages: Mapping[str, Stage], digests: FileDigests) -> None:
    """Ask for a run's folder where it isn't of these stages, those that it shows, or isn't as it was put there."""
    folder = results / run
    wanted = {name: stage.key for name, stage in stages.items()}
    folders = {name: results / stage.folder for name, stage in stages.items()}
    is_made = _read(folder / run_folder.RECORD) == wanted and run_folder.has_weights(folder, folders, digests)
    ask(request_file(results, run), wanted, None if is_made else folder / "metrics.json")


def ask_for_comparison(results: Path, wanted: Mapping[str, str]) -> None:
    """Ask for the comparison of runs where it isn't that of reports with these keys."""
    made = results / run_folder.COMPARED
    ask(request_file(results, ".compare"), wanted, None if _read(made) == wanted else made)


def _wanted(file: Path) -> object:
    found = _read(file)
    return found.get("wanted") if isinstance(found, dict) else None


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def wanted_by(file: Path) -> object:
    """What a request asks for."""
    return read_json(file)["wanted"]
