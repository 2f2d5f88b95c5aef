"""Several processes for one training, one a GPU: how many, starting them by accelerate's launcher, and their end.

The stage's own process computes nothing then: it shows what the main one of the processes says, passes SIGTERM on, and
raises the error that one of them ended with. What they have to tell goes through files of a folder that lasts as long.
"""

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from adder.core import hardware
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.progress import Progress

POLL = 0.2  # seconds between looks at the processes
# One that failed leaves the others waiting for it; they have so many seconds to say that they failed in the same way.
GRACE = 5.0
# Processes wait for the main one while it samples replies or writes a checkpoint.
PATIENCE = timedelta(hours=2)


def choose(wanted: str | int, device: str, step_packs: int) -> Choice:
    """How many processes train: `wanted` is runtime.gpus, `step_packs` the packs of an optimizer step.

    Raises UserError for more GPUs than there are.
    """
    import torch

    if device == "cpu":
        if wanted not in ("auto", 1):
            raise UserError(f"runtime.gpus: {wanted} were asked for, but training runs on the CPU here; use 'auto'")
        return Choice(1, "on a CPU one process uses all cores")
    visible = torch.cuda.device_count()
    if wanted != "auto" and wanted > visible:
        raise UserError(f"runtime.gpus: {wanted} were asked for, and torch sees {visible} here; use 'auto' or less")
    number = visible if wanted == "auto" else wanted
    why = f"{'each' if number > 1 else 'one'} of the {visible} GPUs here" if visible > 1 else "one GPU is here"
    if number > step_packs:
        return Choice(step_packs, f"{why}, but an optimizer step has no more packs (train.effective_batch_size)")
    return Choice(number, why if wanted == "auto" else f"{why}, as set by runtime.gpus")


def train(request: dict, processes: int, device: str, progress: Progress) -> None:
    """Train in `processes` processes on GPUs ("cuda"), or for tests on the "cpu".

    `request`: the arguments of train.start but for `progress`. Raises planner.MemoryRanOut and UserError as that does,
    RuntimeError for any other end.
    """
    from adder.training.step_planner import MemoryRanOut

    with tempfile.TemporaryDirectory(prefix="adder-") as name:
        folder = Path(name)
        (folder / "request").write_bytes(pickle.dumps({"device": device, "arguments": request}))
        told = _run(folder, processes, progress)
        outcomes = [read_json(path) for path in sorted(folder.glob("outcome-*.json"), key=_age)]
    for kind, error in (("memory", MemoryRanOut), ("user", UserError), ("failed", RuntimeError)):
        for outcome in outcomes:
            if outcome["kind"] == kind:
                raise error(outcome["text"])
    if len(outcomes) < processes:
        if told:
            raise UserError("told to stop (SIGTERM) before the first step")
        raise RuntimeError("one of the training processes was killed (out of main memory?)")


def _run(folder: Path, processes: int, progress: Progress) -> bool:
    """Start the processes and wait for their end; return whether they were told to stop."""
    write_json(
        folder / "accelerate.json",
        # Everything, so that neither a configuration of the user's own nor a default comes in. Port 0: a free one.
        {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU",
            "num_machines": 1,
            "machine_rank": 0,
            "num_processes": processes,
            "main_process_port": 0,
            "mixed_precision": "no",
            "use_cpu": False,
            "debug": False,
        },
    )
    threads = str(max(1, hardware.threads() // processes))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")])),
        "ADDER_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        # The launcher would give the processes 30 seconds; this process tells them, and they take what they need.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.json")]
    command += ["--module", "adder.training.distributed.launcher", str(folder)]
    with _told_to_stop() as told:
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_as_launcher)
        shown, passed_on, failed = 0, set(), None
        try:
            while launcher.poll() is None and (failed is None or time.monotonic() < failed + GRACE):
                shown = _show(folder, shown, progress)
                if told:
                    passed_on |= _pass_on(folder, passed_on)
                if failed is None and any(read_json(p)["kind"] != "done" for p in folder.glob("outcome-*.json")):
                    failed = time.monotonic()
                time.sleep(POLL)
        finally:
            if launcher.poll() is None:
                launcher.kill()  # and with it the processes that it started: see _die_with_parent
                launcher.wait()
            _show(folder, shown, progress)
    return bool(told)


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """A list that is no longer empty once this process got SIGTERM (where it may listen)."""
    told: list[int] = []
    listening = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number)) if listening else None
    try:
        yield told
    finally:
        if listening:
            signal.signal(signal.SIGTERM, before)


def _pass_on(folder: Path, done: set[int]) -> set[int]:
    """Send SIGTERM to the processes that have begun and didn't get it yet; return their ids."""
    begun = {read_json(path) for path in folder.glob("process-*.json")} - done
    for process in begun:
        os.kill(process, signal.SIGTERM)
    return begun


def _show(folder: Path, shown: int, progress: Progress) -> int:
    """Show what the main process has said after its first `shown` lines; return how many lines there are now."""
    said = folder / "said.jsonl"
    lines = said.read_text().splitlines(keepends=True) if said.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    for line in lines[shown:]:
        method, arguments = json.loads(line)
        getattr(progress, method)(**arguments)
    return len(lines)


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _as_launcher() -> None:
    """In the launcher's process, before its program: deaf to SIGTERM, and not to outlive this process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()


def _die_with_parent() -> None:
    """Let Linux kill this process when the one that started it ends (prctl's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# In each of the processes ---------------------------------------------------------------------------------------------


class Said(Progress):
    """A progress that is shown by the process that started this one."""

    def __init__(self, file: Path):
        self.file = file.open("a", buffering=1)

    def line(self, text: str, last: bool = False) -> None:
        """As Progress.line."""
        self.file.write(json.dumps(["line", {"text": text, "last": last}]) + "\n")

    def say(self, text: str) -> None:
        """As Progress.say."""
        self.file.write(json.dumps(["say", {"text": text}]) + "\n")


def work(folder: Path) -> None:
    """Train as one of the processes that accelerate's launcher started, and leave word of how it ended."""
    _die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until training listens
    number = int(os.environ["RANK"])
    _leave(folder / f"process-{number}.json", os.getpid())
    from adder.training import run as train
    from adder.training.step_planner import MemoryRanOut

    request = pickle.loads((folder / "request").read_bytes())
    progress = Said(folder / "said.jsonl") if number == 0 else Progress.silent()
    outcome = {"kind": "done"}
    try:
        _join(request["device"])
        train.start(**request["arguments"], progress=progress)
    except MemoryRanOut as error:
        outcome = {"kind": "memory", "text": str(error)}
    except UserError as error:
        outcome = {"kind": "user", "text": str(error)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"kind": "failed", "text": f"{type(error).__name__}: {str(error)[:500]}"}
    _leave(folder / f"outcome-{number}.json", outcome)
    if outcome["kind"] != "done":
        os._exit(1)  # at once: leaving the group would wait for the others
    import torch

    torch.distributed.destroy_process_group()


def _join(device: str) -> None:
    """Become one of the group of processes, each with a GPU of its own."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)


def _leave(path: Path, content: object) -> None:
    """Write a file that whoever looks finds whole or not at all."""
    partial = path.with_suffix(".partial")
    write_json(partial, content)
    partial.replace(path)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
