"""The jobs beside the stages: a run's model and pages where people look, its guard, its upload, the comparison of runs.

Each writes what it did, or the user's mistake, into its log; a mistake ends the process with status 1.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from adder.core.display.status import is_shown_by_plugin, status_file
from adder.core.errors import UserError, system_errors_told
from adder.core.file_digests import FileDigests
from adder.core.files import read_json, write_json
from adder.core.progress import Progress
from adder.workflow.requests import wanted_by
from adder.workflow.run_folder import COMPARED, PAGES, write_record
from adder.workflow.stage_runner import WEIGHTS, intact_inputs, link_tree


def link_run(stages: Mapping[str, Path], target: Path, log: Path) -> None:
    """Put a run's model and pages into `target`: the weights as reflinks or hard links, all else as copies.

    People edit and mail small files, and Snakemake sets the time stamp of its outputs: neither may reach into a stage.
    `stages`: the folders of report, merge, train, and of gguf where there is one. What isn't as its stage wrote it
    ends the process with a sentence.
    """
    digests = FileDigests.of_results(target.parent)
    with _mistakes_logged(log, _progress("link", log)):
        for folder in stages.values():
            intact_inputs(folder, ("",), digests)
        for page in PAGES:
            (target / page).write_bytes((stages["report"] / page).read_bytes())
        _link_folder(stages["merge"] / "model", target / "merged_model", digests)
        _link_folder(stages["train"] / "adapter", target / "adapter", digests)
        shutil.copyfile(stages["report"] / "model_card.md", target / "merged_model" / "README.md")
        digests.remove(target / "model.gguf")
        if "gguf" in stages:
            digests.clone_or_link(stages["gguf"] / "model.gguf", target / "model.gguf")
        write_record(target, stages, digests)
        log.write_text("".join(f"{name}: {folder}\n" for name, folder in stages.items()), encoding="utf-8")


def check_guard(metrics: Path, result: Path, log: Path) -> None:
    """Write the guard's word on a run (its `metrics`.json) to `result`.

    Ends the process with a sentence where a task's score fell further than its settings allow.
    """
    from adder.report import regression_guard

    progress = _progress("guard", log)
    found = regression_guard.check(read_json(metrics)["tasks"])
    log.write_text(f"{found['sentence']}\n", encoding="utf-8")
    if not found["passed"]:
        report = metrics.with_name("report.html")
        progress.fail(f"{found['sentence']} The model and {report} are there all the same.", lead="")
        sys.exit(1)
    progress.line(found["sentence"], last=True)
    write_json(result, found)


def compare_runs(
    runs: Mapping[str, Mapping[str, Path]],
    out: Path,
    request: Path,
    log: Path,
    unfinished: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the comparison's page and table into `out`, and the `request` that they answer into its place there.

    `runs`: the folders of each run's stages by name. `unfinished`: why the others aren't among them; the request is
    then not answered yet.
    """
    from adder.report.comparison import page
    from adder.report.comparison.sentences import sentence

    progress = _progress("compare", log)
    with _mistakes_logged(log, progress):
        verdict = sentence(page.run(runs, out, unfinished))
        (out / COMPARED).parent.mkdir(exist_ok=True)
        write_json(out / COMPARED, {} if unfinished else wanted_by(request))
        log.write_text(f"{verdict}\n", encoding="utf-8")
        progress.say(verdict)


def push_run(folder: Path, hub: str, private: bool, run: str, result: Path, log: Path) -> None:
    """Upload a run's merged model (`folder`) to the repository `hub`; write to `result` where it is."""
    from adder.export.hub_push import push

    verdict = read_json(folder.parent / "metrics.json")["verdict"]["sentence"]
    progress = _progress("push", log)
    with _mistakes_logged(log, progress):
        found = push(folder, hub, private, f"{run}: {verdict}", progress)
        log.write_text(f"{found['url']} at commit {found['commit']}\n", encoding="utf-8")
        write_json(result, found)


def _progress(name: str, log: Path) -> Progress:
    stream = io.StringIO() if is_shown_by_plugin() else None
    return Progress(name, stream, status_file(log))


def _link_folder(source: Path, target: Path, digests: FileDigests) -> None:
    """Put a stage's folder into the run's, small files as copies; where the run no longer has it, nothing stays."""

    def put(file: str, place: str) -> None:
        if file.endswith(WEIGHTS):
            digests.clone_or_link(Path(file), Path(place))
        else:
            shutil.copy2(file, place)

    if source.is_dir():
        link_tree(source, target, digests, put)
    else:
        digests.remove(target)


@contextlib.contextmanager
def _mistakes_logged(log: Path, progress: Progress) -> Iterator[None]:
    try:
        with system_errors_told():
            yield
    except UserError as error:
        with contextlib.suppress(OSError):  # a full disk
            log.write_text(f"{error}\n", encoding="utf-8")
        progress.fail(str(error))
        sys.exit(1)
