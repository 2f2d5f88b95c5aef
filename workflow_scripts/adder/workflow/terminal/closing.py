"""What stands last: the verdict on each run and where its results are."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adder.core.display.status import is_shown_by_plugin
from adder.core.display.text import one_line, printable
from adder.core.files import read_json
from adder.report.stage import spoken
from adder.workflow.terminal.snakemake_text import configuration_files

MOST_RUNS = 8  # that are named one by one; the comparison has all


class Finished(NamedTuple):
    """A run whose report is there: its folder, the verdict's word, with what stands against it, and its sentence."""

    name: str
    folder: Path
    word: str
    sentence: str


class ClosingLine(NamedTuple):
    """A line: what it is of, and what it says."""

    head: str
    text: str


def finished_runs(runs: Sequence[str], results: Path) -> list[Finished]:
    """The runs whose report is in its place."""
    found = []
    for run in runs:
        folder = results / run
        verdict = _verdict(folder / "metrics.json")
        if verdict is not None and (folder / "report.html").exists():
            found.append(Finished(run, folder, spoken(verdict), str(verdict["sentence"])))
    return found


def closing_lines(runs: Sequence[str], results: Path) -> Iterator[ClosingLine]:
    """Verdicts and paths of the runs that have any."""
    finished = finished_runs(runs, results)
    if len(runs) == 1:
        for run in finished:
            yield ClosingLine("", run.sentence)
            yield from _paths(run)
        return
    for run in finished[:MOST_RUNS]:
        yield ClosingLine(one_line(run.name), f"{run.word}: {run.folder / 'report.html'}")
    if len(finished) > MOST_RUNS:
        yield ClosingLine("", f"and {len(finished) - MOST_RUNS:,} more runs in {results}/")
    if finished and (results / "compare.html").exists():
        yield ClosingLine("all runs", f"{results / 'compare.html'}")
    elif finished:
        files = configuration_files(sys.argv[1:])
        asked = [command("snakemake"), "--cores", "1", "compare", *(["--configfile", *files] if files else [])]
        yield ClosingLine("all runs", f"on one page: {shlex.join(asked)}")


def _paths(run: Finished) -> Iterator[ClosingLine]:
    yield ClosingLine("report", f"{run.folder / 'report.html'}")
    if (run.folder / "merged_model" / "config.json").exists():
        yield ClosingLine("model", f"{run.folder / 'merged_model'}/")
        yield ClosingLine("talk to it", shlex.join([command("adder"), "chat", str(run.folder), "--both"]))
    if (run.folder / "model.gguf").exists():
        yield ClosingLine("GGUF", f"{run.folder / 'model.gguf'}")


def command(name: str) -> str:
    """How to call a command that is installed beside this Python: by its path, where its name alone leads elsewhere."""
    own = Path(sys.prefix) / "bin" / name
    if not own.exists() or os.path.realpath(shutil.which(name) or "") == os.path.realpath(own):
        return name
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def _verdict(metrics: Path) -> dict[str, Any] | None:
    try:
        found = read_json(metrics)["verdict"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and {"verdict", "sentence"} <= found.keys() else None


def show(runs: Sequence[str], results: Path) -> None:
    """Print them where the logger plugin doesn't, as it does with --logger-adder-plain."""
    if not is_shown_by_plugin():
        for line in closing_lines(tuple(runs), results):
            print(": ".join(filter(None, map(printable, line))), file=sys.stderr)
