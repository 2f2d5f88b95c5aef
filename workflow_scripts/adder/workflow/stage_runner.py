"""Running one stage so that its folder is whole or absent, and running it only when it must be.

A finished stage is known by its fingerprint: its name, settings, code and the digests of what it reads. It is kept
in `cache/<stage>/<fingerprint>/` as hard links, which cost no room, and a stage that would compute the same again is
restored from there. The folder `stages/<stage>/<key>/` is what Snakemake and people look at; `stage.json` in it is
written last.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TextIO

from adder.core import hardware
from adder.core.errors import UserError
from adder.core.files import digest_file, link_or_copy, read_json, write_json
from adder.core.progress import Progress
from adder.workflow import attempt_times, lock
from adder.workflow.code_digest import code_digest
from adder.workflow.settings import Runtime
from adder.workflow.stage_graph import CONTINUED, canonical, reads

RECORD = "stage.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "lm-eval", "snakemake", "pyarrow")


def execute(
    stage: str,
    module: str,
    settings: dict,
    inputs: dict[str, Path],
    results: Path,
    key: str,
    log: Path,
    function: str = "run",
    runtime: dict | None = None,
    identity: dict | None = None,
) -> None:
    """Run `<module>.<function>` into `results/stages/<stage>/<key>/`, or restore it where it is known.

    `inputs` maps the parents' names to their folders. `identity` stands for the settings where these name files of the
    user's, by their digests. All output goes to the file `log`; the terminal shows progress and, for a mistake of the
    user's, one message. Exits with status 1 on failure, leaving no folder behind. Where another process is at work on
    the stage, such as a job whose Snakemake was killed, that one is waited for.
    """
    runtime = Runtime.model_validate(runtime or {}).model_dump()
    os.environ["ADDER_DEVICE"] = runtime["device"]
    threads = str(runtime["threads"])
    os.environ["ADDER_THREADS"] = threads
    # Snakemake sets these to the rule's threads, which `--cores 1` makes one: see hardware.use_threads.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(hardware.available_cores()) if threads == "auto" else threads
    log.parent.mkdir(parents=True, exist_ok=True)
    with _output_to(log) as terminal:
        progress = Progress(stage, terminal)

        def busy(who: str) -> None:
            progress.say(f"{who} is still at work on this stage; waiting for it")

        try:
            with lock.held(results / "stages" / stage / f".{key}.lock", busy) as waited:
                if not waited:
                    os.ftruncate(2, 0)  # the log of an earlier job; that of the process waited for stays
                _restore_or_run(
                    stage, module, function, settings, identity, inputs, results, key, runtime, progress, waited
                )
        except UserError as error:
            _tell_log(f"UserError: {error}\n")
            progress.say(f"cannot go on: {error}")
            sys.exit(1)
        except KeyboardInterrupt as error:
            progress.say(f"interrupted; the same command {str(error) or 'goes on with this stage'}")
            sys.exit(130)
        except Exception as error:
            _tell_log(traceback.format_exc())
            progress.say(f"failed: {type(error).__name__}: {str(error)[:500]}\n{stage}: the whole story is in {log}")
            sys.exit(1)


def _restore_or_run(
    stage, module, function, settings, identity, inputs, results, key, runtime, progress, waited
) -> None:
    start = time.monotonic()
    record = {
        "stage": stage,
        "key": key,
        "settings": settings,
        "identity": identity,
        "inputs": {name: input_digests(folder, reads(stage, name)) for name, folder in inputs.items()},
        "code": code_digest(module),
    }
    record["fingerprint"] = fingerprint(record, function)
    folder = results / "stages" / stage / key
    kept = results / "cache" / stage / record["fingerprint"]
    if runtime["restore"] and restore(kept, folder, key):
        progress.say(f"restored from an equal earlier result in {time.monotonic() - start:.1f} s")
        return
    if waited and _fingerprint_of(folder) == record["fingerprint"]:
        progress.say("the other process has finished it")
        return
    partial = folder.with_name(f".{key}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checkpoints = results / "checkpoints" / record["fingerprint"]
    spent = checkpoints.with_name(f"{checkpoints.name}.attempts.json")
    arguments = {"checkpoints": checkpoints} if stage in CONTINUED else {}
    if stage == "train":
        arguments["runtime"] = runtime | {"results": str(results)}
    try:
        run = getattr(importlib.import_module(module), function)
        with attempt_times.counted(spent, start) if stage in CONTINUED else contextlib.nullcontext([]) as earlier:
            record["summary"] = run(settings, inputs, partial, progress, **arguments)
            record["seconds"] = round(sum(earlier) + time.monotonic() - start, 3)
            if earlier:
                record["attempts"] = len(earlier) + 1
            finish(partial, record)
        _replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_next_start(stage, checkpoints)) from None
        raise
    link_tree(folder, kept)
    if stage in CONTINUED:
        shutil.rmtree(checkpoints, ignore_errors=True)
        spent.unlink(missing_ok=True)
    made = f", in {record['attempts']} attempts" if earlier else ""
    progress.say(f"done in {_duration(record['seconds'])}{made}")


def _next_start(stage: str, checkpoints: Path) -> str:
    kept = stage in CONTINUED and any(checkpoints.glob(CONTINUED[stage]))
    return "goes on from its last checkpoint" if kept else "starts this stage anew"


def _fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of the finished stage in `folder`, if there is one."""
    return read_json(folder / RECORD)["fingerprint"] if (folder / RECORD).exists() else None


def fingerprint(record: dict, function: str) -> str:
    """Digest (32 hex digits) of what decides a stage's output: name, settings, code, content of what it reads."""
    meaning = record["settings"] if record["identity"] is None else record["identity"]
    parts = [record["stage"], function, meaning, record["code"], record["inputs"]]
    return hashlib.blake2b(canonical(parts).encode(), digest_size=16).hexdigest()


def input_digests(folder: Path, reads: tuple[str, ...]) -> dict[str, str]:
    """Digests of the files below `folder` that a stage reads, by path, as its record has them.

    A file that was changed after its stage had finished is digested anew.
    """
    outputs = read_json(folder / RECORD)["outputs"]
    digests = {}
    for path, known in outputs.items():
        if any(path == wanted or (wanted.endswith("/") and path.startswith(wanted)) or not wanted for wanted in reads):
            stat = (folder / path).stat()
            same = [stat.st_size, stat.st_mtime_ns] == [known["bytes"], known["mtime_ns"]]
            digests[path] = known["digest"] if same else digest_file(folder / path)
    return digests


def finish(folder: Path, record: dict) -> None:
    """Write the record of a stage into its folder: settings, digests of inputs and outputs, versions, time, memory."""
    outputs = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        entry = {"digest": digest_file(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        outputs[str(path.relative_to(folder))] = entry
    record |= {
        "outputs": outputs,
        "restored": False,
        "peak_memory_bytes": _peak_memory(),
        "versions": _versions(),
        "hardware": hardware.describe(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        # Training may have been in processes of its own, and says.
        own = torch.cuda.max_memory_allocated()
        record["peak_gpu_memory_bytes"] = (record.get("summary") or {}).get("peak_gpu_memory_bytes", own)
    write_json(folder / RECORD, record)


def restore(kept: Path, folder: Path, key: str) -> bool:
    """Make `folder` from the kept result, if that is there and its files are as they were written."""
    if not (kept / RECORD).exists():
        return False
    record = read_json(kept / RECORD)
    for path, known in record["outputs"].items():
        file = kept / path
        if not file.exists() or [file.stat().st_size, file.stat().st_mtime_ns] != [known["bytes"], known["mtime_ns"]]:
            shutil.rmtree(kept)
            return False
    link_tree(kept, folder)
    # The record is the folder's own: the kept one may bear another key.
    partial = folder / f".{RECORD}"
    write_json(partial, record | {"key": key, "restored": True})
    partial.replace(folder / RECORD)
    return True


def link_tree(source: Path, target: Path, put: Callable[[str, str], object] = link_or_copy) -> None:
    """Make `target` a tree of hard links to the files of `source` (copies across file systems), all at once.

    `put(from, to)` may do otherwise with some files.
    """
    partial = target.with_name(f".{target.name}.linking")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, copy_function=put)
    _replace(partial, target)


def _replace(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what stood there is gone."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[TextIO]:
    """Send everything that is written to standard output and error into `log`; yield the terminal that was there."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved_out, saved_err = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    with log.open("a") as file:  # a process that outlived its Snakemake may be writing to it
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.captureWarnings(True)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved_out, 1)
        os.dup2(saved_err, 2)
        os.close(saved_out)
        os.close(saved_err)
        terminal.close()


def _tell_log(text: str) -> None:
    os.write(2, text.encode())


def _peak_memory() -> int:
    """Largest resident set of this process in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
