"""Running one stage so that its folder is whole or absent, and running it only when it must be.

A finished stage is known by its fingerprint: its name, settings, code and the digests of what it reads. It is kept
in `cache/<stage>/<fingerprint>/` as hard links, which cost no room, and a stage that would compute the same again is
restored from there. The folder `stages/<stage>/<key>/` is what Snakemake and people look at; `stage.json` in it is
written last.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from adder.core import file_lock, hardware, opened_files
from adder.core.display.status import is_shown_by_plugin, status_file
from adder.core.errors import FULL, UserError, of_system
from adder.core.file_digests import FileDigests, canonical
from adder.core.files import atomic_write, files_in, link_or_copy, read_json, write_json
from adder.core.machine import energy
from adder.core.progress import Progress
from adder.core.secrets import scrubbed, variables_in
from adder.core.stage_record import OutputFile, StageMeaning, StageRecord
from adder.core.stage_spec import Context, Earlier, Runtime, StageSpec
from adder.workflow import attempt_times, slurm_job
from adder.workflow.code_digest import code_digest
from adder.workflow.library_versions import recorded_versions
from adder.workflow.stage_graph import reads
from adder.workflow.stages import SPECS

RECORD = "stage.json"
WEIGHTS = (".safetensors", ".gguf")
MOST_EARLIER = 8  # results of a stage that it looks into for parts to take over
FULL_AS_TEXT = re.compile(r"No space left|File too large|Disk quota exceeded|^\d+ requested and \d+ written$")


@dataclasses.dataclass(frozen=True)
class Job:
    """One stage to run: `parameters` as stage_graph.Stage.parameters has them, `inputs` the parents' folders by name.

    All output goes to the file `log`; the result to `results`/stages/<name>/<key>/.
    """

    spec: StageSpec
    parameters: dict[str, Any]
    inputs: dict[str, Path]
    results: Path
    key: str
    log: Path
    runtime: Runtime = dataclasses.field(default_factory=Runtime)

    @property
    def folder(self) -> Path:
        """Where the finished stage stands."""
        return self.results / "stages" / self.spec.name / self.key

    def meaning(self, digests: FileDigests) -> StageMeaning:
        """What decides the stage's result: settings, what it reads and is made of.

        Raises UserError where what it reads isn't as it was written.
        """
        return {
            "stage": self.spec.name,
            "key": self.key,
            "settings": self.parameters["settings"],
            "identity": self.parameters["identity"],
            "asked_versions": self.parameters.get("versions") or {},
            "inputs": {
                name: intact_inputs(folder, reads(self.spec, name), digests) for name, folder in self.inputs.items()
            },
            "code": code_digest(self.spec.run),
        }


def execute(name: str, parameters: dict[str, Any], runtime: dict[str, Any] | None = None, **where: Any) -> None:
    """Run the stage `name` into its folder, or restore it where it is known; `where`: as in Job.

    The terminal shows progress and, for a mistake of the user's, one message. Exits with status 1 on failure, leaving
    no folder behind. Where another process is at work on the stage, such as a job whose Snakemake was killed, that one
    is waited for.
    """
    job = Job(SPECS[name], parameters, runtime=Runtime.model_validate(runtime or {}), **where)
    # Snakemake sets these to the rule's threads, which `--cores 1` makes one: that means one job at a time, not a core.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(hardware.threads(job.runtime.threads))
    # OpenMP's threads wait for one another by spinning, at every small matmul: beside other programs on the same cores
    # that takes most of the time. So short a spin costs nothing alone (benchmarks/loaded_machine.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    secrets = variables_in(parameters["settings"])
    began = time.time()
    _listen_to_slurm()
    with _output_to(job.log, secrets) as terminal:
        progress = Progress(name, terminal, status_file(job.log))

        def busy(who: str) -> None:
            progress.say(f"{who} is still at work on this stage; waiting for it")

        _interrupt_once()
        try:
            with file_lock.held(job.folder.with_name(f".{job.key}.lock"), busy) as waited:
                if not waited:
                    os.ftruncate(2, 0)  # the log of an earlier job; that of the process waited for stays
                _restore_or_run(job, progress, waited)
        except UserError as error:
            _tell_log(f"UserError: {error}\n")
            progress.fail(scrubbed(str(error), secrets))
            _put_back(job, began, progress)
            sys.exit(1)
        except KeyboardInterrupt as error:
            progress.fail(f"interrupted; the same command {str(error) or 'goes on with this stage'}", lead="")
            _put_back(job, began, progress)
            sys.exit(130)
        except Exception as error:
            _tell_log(traceback.format_exc())
            if is_full_disk(error):
                progress.fail(_no_room(job.results))
            elif isinstance(error, OSError) and (told := of_system(error)) is not None:
                progress.fail(scrubbed(str(told), secrets))
            else:
                text = scrubbed(f"failed: {type(error).__name__}: {str(error)[:500]}", secrets)
                progress.fail(f"{text}\n{name}: the whole story is in {job.log}", lead="")
            sys.exit(1)


def _interrupt_once() -> None:
    """Let a second Ctrl-C not disturb what the first one began: tidying up takes a moment."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, interrupt)


def _listen_to_slurm() -> None:
    """End as by Ctrl-C when Slurm says that time is up; a training listens for itself once it has begun."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if "SLURM_JOB_ID" in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def _put_back(job: Job, began: float, progress: Progress) -> None:
    """Put a Slurm job whose time limit has ended it back into the queue, where it then goes on.

    began: seconds since the epoch. Not where it left no checkpoint since then: it would never come to an end.
    """
    if not slurm_job.time_is_up():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which Slurm takes it off its node
    pattern = f"checkpoints/*/{job.spec.continued}"
    if job.spec.continued and any(path.stat().st_mtime >= began for path in job.results.glob(pattern)):
        if slurm_job.put_back():
            progress.say("the job's time limit is near: it went back into the queue, and goes on from there by itself")
            return
        progress.say("the job's time limit is near, and this Slurm puts no job back: start the same command again")
        return
    progress.say(
        f"the job's time limit was too short: ask for more, by --set-resources {job.spec.rule}:runtime=MINUTES"
    )


def _restore_or_run(job: Job, progress: Progress, waited: bool) -> None:
    start = time.monotonic()
    digests = FileDigests.of_results(job.results, progress.say)
    meaning = job.meaning(digests)
    known_as = fingerprint(meaning)
    kept = job.results / "cache" / job.spec.name / known_as
    for rest in job.folder.parent.glob(f".{job.key}.*"):  # of a killed job; the lock is a file
        shutil.rmtree(rest, ignore_errors=True)
    if job.runtime.restore and restore(kept, job.folder, job.key, digests):
        progress.say(f"restored from an equal earlier result in {time.monotonic() - start:.1f} s")
        return
    if waited and _fingerprint_of(job.folder) == known_as:
        progress.say("the other process has finished it")
        return
    partial = job.folder.with_name(f".{job.key}.partial")
    partial.mkdir(parents=True)
    checkpoints = job.results / "checkpoints" / known_as if job.spec.continued else None
    try:
        with _attempts(checkpoints, start) as earlier:
            context = Context(progress, job.runtime, job.results, checkpoints, _earlier(job, digests))
            with _files_unchanged(job), energy.measured() as meter:
                summary = run_stage(job.spec, meaning["settings"], job.inputs, partial, context)
            _refuse_other_inputs(job, meaning)
            seconds = round(sum(earlier) + time.monotonic() - start, 3)
            joules = meter.joules(energy.cards_in_use("peak_gpu_memory_bytes" in (summary or {})))
            digests = FileDigests.of_results(job.results)
            finish(partial, meaning, summary, seconds, digests, len(earlier) + 1, joules)
        # Kept first: from then on nothing that kills this process costs the work.
        link_tree(partial, kept, digests)
        _replace(partial, job.folder, digests)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_next_start(job.spec, checkpoints)) from None
        raise
    if checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        _attempts_file(checkpoints).unlink(missing_ok=True)
    made = f", in {len(earlier) + 1} attempts" if earlier else ""
    progress.say(f"done in {_duration(seconds)}{made}")


@contextlib.contextmanager
def _files_unchanged(job: Job) -> Iterator[None]:
    """See to it that what is read inside has the digests that the job's key stands for.

    Raises UserError where a file that the settings name is another than when the workflow was parsed, or becomes
    another while it is read: somebody exports it anew, for example.
    """
    if job.spec.identity is None:
        yield
        return
    digests = FileDigests.of_results(job.results)
    if not _is_identity(job, digests):
        files = ", ".join(map(str, digests.seen))
        raise UserError(f"{files}: changed since the workflow began; start it again, for what it is now")
    yield
    changed, later = digests.changed(), FileDigests.of_results(job.results)
    # Also files that have come and gone: a pattern stands for others then.
    if changed or not _is_identity(job, later):
        files = ", ".join(map(str, changed or later.seen))
        raise UserError(f"{files}: changed while being read; start the workflow again once nobody writes to it")


def _refuse_other_inputs(job: Job, meaning: StageMeaning) -> None:
    """Raise UserError where what a stage has read of its parents isn't by now what it was when it began."""
    if job.meaning(FileDigests.of_results(job.results))["inputs"] != meaning["inputs"]:
        folders = ", ".join(map(str, job.inputs.values()))
        raise UserError(f"{folders}: made anew while being read; start the workflow again once nobody writes there")


def _is_identity(job: Job, digests: FileDigests) -> bool:
    """Whether the job's settings still stand for what they stood for when the workflow was parsed."""
    settings = job.spec.settings.model_validate(job.parameters["settings"])
    assert job.spec.identity is not None
    now = job.spec.identity(settings, job.spec.section or "", digests)
    return canonical(now) == canonical(job.parameters["identity"])


def run_stage(
    spec: StageSpec, settings: dict[str, Any], inputs: dict[str, Path], out: Path, context: Context
) -> dict[str, Any]:
    """Do a stage's work in this process, whatever is kept of it; write its files into the folder `out`.

    settings: as JSON. inputs: the parents' folders by the name under which the stage reads them. Returns the stage's
    summary, a few figures for its record.
    """
    run = importlib.import_module(spec.run).run
    inputs_type: Any = typing.get_type_hints(run)["inputs"]
    own = inputs_type(**inputs) if isinstance(inputs_type, type) else inputs  # the report takes the mapping itself
    return run(spec.settings.model_validate(settings), own, out, context)


def _attempts(checkpoints: Path | None, start: float) -> contextlib.AbstractContextManager[list[float]]:
    if checkpoints is None:
        return contextlib.nullcontext([])
    return attempt_times.counted(_attempts_file(checkpoints), start)


def _attempts_file(checkpoints: Path) -> Path:
    return checkpoints.with_name(f"{checkpoints.name}.attempts.json")


def _next_start(spec: StageSpec, checkpoints: Path | None) -> str:
    kept = checkpoints is not None and spec.continued and any(checkpoints.glob(spec.continued))
    return "goes on from its last checkpoint" if kept else "starts this stage anew"


def _fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of the finished stage in `folder`, if there is one."""
    record = read_record(folder)
    return record["fingerprint"] if record else None


def fingerprint(meaning: StageMeaning) -> str:
    """Digest (32 hex digits) of what decides a stage's output: name, settings or what stands for them, code, inputs."""
    parts = [meaning["stage"], meaning["identity"], meaning["asked_versions"], meaning["code"], meaning["inputs"]]
    return hashlib.blake2b(canonical(parts).encode(), digest_size=16).hexdigest()


def input_digests(record: StageRecord, wanted_paths: tuple[str, ...]) -> dict[str, str]:
    """Digests of the files that a stage reads of a parent with this record, by path."""
    return {path: known["digest"] for path, known in record["outputs"].items() if _is_wanted(path, wanted_paths)}


def intact_inputs(folder: Path, wanted_paths: tuple[str, ...], digests: FileDigests) -> dict[str, str]:
    """The input_digests of what is in `folder`.

    Raises UserError where a file isn't as its stage wrote it: what were made of it would bear the other's name.
    """
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder / RECORD}: is damaged; start the workflow again, which makes the stage anew")
    if broken := broken_outputs(folder, record, digests, wanted_paths):
        more = f" and {len(broken) - 1} more files" if len(broken) > 1 else ""
        raise UserError(
            f"{folder / broken[0]}{more}: not as the stage wrote it; start the workflow again, which makes the stage "
            "anew"
        )
    return input_digests(record, wanted_paths)


def broken_outputs(
    folder: Path, record: StageRecord, digests: FileDigests, wanted_paths: tuple[str, ...] = ("",)
) -> list[str]:
    """Which files of a finished stage's folder, of those at `wanted_paths`, aren't as the record has them.

    That is also a file that the stage didn't write: what reads a model's folder reads it too. Hidden files, which
    systems leave where people look, are nobody's.
    """
    outputs = record["outputs"]
    found = (str(path.relative_to(folder)) for path in files_in(folder) if not path.name.startswith("."))
    added = [path for path in found if path not in outputs and path != RECORD and _is_wanted(path, wanted_paths)]
    return [
        path
        for path in outputs
        if _is_wanted(path, wanted_paths)
        and not digests.holds(folder / path, outputs[path]["digest"], outputs[path]["bytes"])
    ] + added


def _is_wanted(path: str, wanted_paths: tuple[str, ...]) -> bool:
    return any(
        path == wanted or (wanted.endswith("/") and path.startswith(wanted)) or not wanted for wanted in wanted_paths
    )


def other_by_now(record: StageRecord, digests: FileDigests) -> list[str]:
    """The files that a stage has read beside what its settings name, as its summary tells, that are others by now."""
    return opened_files.changed((record["summary"] or {}).get("also_read", {}), digests)


def read_record(folder: Path) -> StageRecord | None:
    """The record in a stage's folder; None where there is none or it isn't what was written."""
    try:
        record: StageRecord = read_json(folder / RECORD)
        return record if record.get("check") == own_check(record) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def own_check(record: StageRecord) -> str:
    """Digest (16 hex digits) of the rest of a record, by which damage to it is told."""
    rest = {name: value for name, value in record.items() if name != "check"}
    return hashlib.blake2b(canonical(rest).encode(), digest_size=8).hexdigest()


def finish(
    folder: Path,
    meaning: StageMeaning,
    summary: dict[str, Any],
    seconds: float,
    digests: FileDigests,
    attempts: int = 1,
    joules: Mapping[energy.Part, float] | None = None,
) -> StageRecord:
    """Write the record of a stage into its folder, last of all, and return it. joules: of the last attempt.

    Weights become read-only, for what people are given are links to the same files; links to the user's own do not.
    """
    files = files_in(folder)
    own = [path for path in files if path.stat().st_nlink == 1]
    for path in own:
        if path.suffix in WEIGHTS:
            path.chmod(0o444)
    found = dict(zip(files, digests.of_all(files), strict=True))
    digests.note({path: found[path] for path in own})
    outputs: dict[str, OutputFile] = {
        str(path.relative_to(folder)): {"digest": digest, "bytes": path.stat().st_size}
        for path, digest in found.items()
    }
    record: StageRecord = {
        **meaning,
        "fingerprint": fingerprint(meaning),
        "summary": summary,
        "outputs": outputs,
        "seconds": seconds,
        "restored": False,
        "peak_memory_bytes": _peak_memory(),
        "versions": {"python": sys.version.split()[0], **recorded_versions()},
        "hardware": hardware.describe(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if attempts > 1:
        record["attempts"] = attempts
    elif joules:
        record["energy_joules"] = round(sum(joules.values()), 3)
        record["energy_parts"] = {part: round(used, 3) for part, used in joules.items()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        # Training may have been in processes of its own, and says.
        own = torch.cuda.max_memory_allocated()
        record["peak_gpu_memory_bytes"] = (summary or {}).get("peak_gpu_memory_bytes", own)
    _write_record(folder, record)
    return record


def _write_record(folder: Path, record: StageRecord) -> None:
    with atomic_write(folder / RECORD) as partial:
        write_json(partial, {**record, "check": own_check(record)})


def restore(kept: Path, folder: Path, key: str, digests: FileDigests) -> bool:
    """Make `folder` from the kept result, if that is there, its files as they were written and what it was made of."""
    if not kept.exists():
        return False
    record = read_record(kept)
    if record is None or broken_outputs(kept, record, digests) or other_by_now(record, digests):
        shutil.rmtree(kept)
        return False

    def mark(partial: Path) -> None:
        # The record is the folder's own: the kept one may bear another key.
        _write_record(partial, {**record, "key": key, "restored": True})

    link_tree(kept, folder, digests, finish=mark)
    return True


def _earlier(job: Job, digests: FileDigests) -> Earlier:
    """The newest finished results of the job's stage; none where all is to be computed again."""
    kept = (job.results / "cache" / job.spec.name).glob("[!.]*/" + RECORD) if job.runtime.restore else ()
    records = {file.parent: record for file in kept if (record := read_record(file.parent)) is not None}
    newest = sorted(records, key=lambda folder: (records[folder]["finished_at"], folder), reverse=True)
    intact = (folder for folder in newest if not broken_outputs(folder, records[folder], digests))
    return Earlier(tuple(itertools.islice(intact, MOST_EARLIER)), code_digest)


def link_tree(
    source: Path,
    target: Path,
    digests: FileDigests,
    put: Callable[[str, str], object] = link_or_copy,
    finish: Callable[[Path], object] = lambda partial: None,
) -> None:
    """Make `target` a tree of hard links to the files of `source` (copies across file systems), all at once.

    `put(from, to)` may do otherwise with some files; `finish` is called with the tree before it gets its name.
    `digests` remember the files with their links.
    """
    partial = target.with_name(f".{target.name}.linking")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with digests.with_links(files_in(source)):
        shutil.copytree(source, partial, copy_function=put)
    finish(partial)
    _replace(partial, target, digests)


def _replace(partial: Path, folder: Path, digests: FileDigests) -> None:
    """Rename `partial` to `folder`; what stood there is gone."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        digests.remove(old)
    else:
        partial.rename(folder)


@contextlib.contextmanager
def _output_to(log: Path, secrets: Iterable[str]) -> Iterator[TextIO]:
    """Send everything that is written to standard output and error into `log`; yield the terminal that was there, or
    the log where Snakemake's logger plugin has the terminal.

    What a library may have written of secrets, those in the environment variables `secrets` among them, is taken out.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved_out, saved_err = os.dup(1), os.dup(2)
    terminal = None if is_shown_by_plugin() else os.fdopen(os.dup(2), "w", buffering=1)
    with _opened_log(log) as file:  # a process that outlived its Snakemake may be writing to it
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.captureWarnings(True)
    try:
        yield terminal or sys.stderr
    finally:
        with contextlib.suppress(OSError):  # a full disk
            sys.stdout.flush()
            sys.stderr.flush()
            _scrub(log, secrets)
        os.dup2(saved_out, 1)
        os.dup2(saved_err, 2)
        os.close(saved_out)
        os.close(saved_err)
        if terminal is not None:
            terminal.close()


def _scrub(log: Path, secrets: Iterable[str]) -> None:
    """Take secrets out of a log; it stays the same file, to which another process may be writing."""
    text = log.read_text(encoding="utf-8", errors="replace")
    clean = scrubbed(text, secrets)
    if clean != text:
        log.write_text(clean, encoding="utf-8")


def _opened_log(log: Path) -> TextIO:
    """The log, to append to; nothing's log where there is no room for a file of its own."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("a")
    except OSError:
        return open(os.devnull, "a")


def _tell_log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk
        os.write(2, text.encode())


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error says, or comes from one that says, that there is no room left for a file."""
    while error is not None:
        numbered = isinstance(error, OSError) and error.errno in FULL
        # Rust's and C++'s writers tell it as text, and so does numpy.
        if numbered or FULL_AS_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_room(results: Path) -> str:
    free = shutil.disk_usage(results).free / 1e6
    return (
        f"the disk of {results}/ has no room left ({free:,.1f} MB free, or a quota is used up): make room, then the "
        "same command goes on"
    )


def _peak_memory() -> int:
    """Largest resident set of this process in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
