"""Several processes for one training, one a GPU: how many, starting them by torchrun, and their end.

The stage's own process computes nothing then: it shows what rank 0 says, passes SIGTERM on, and raises the error that
one of them ended with. What they have to tell goes through files of a folder that lasts as long. torchrun forms the
group and starts its ranks. Of our own is what it doesn't do: to let a rank that was sent SIGTERM take what time its
checkpoint needs (torchrun kills after 30 seconds), to end with the one sentence that a rank has for the user instead of
a traceback of the launcher's, and to leave no rank behind where this process is killed. torch.multiprocessing would
run Snakemake's script of the stage again in every rank, since it imports the main module.
"""

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
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypedDict

import torch
from accelerate.utils import check_cuda_p2p_ib_support

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import atomic_write, read_json, write_json
from adder.core.machine import graphics_cards
from adder.core.parallel import die_with_parent
from adder.core.progress import Progress
from adder.training.fit import TrainJob, fit
from adder.training.step_planner import MemoryRanOut

POLL = 0.2  # seconds between looks at the processes
# One that failed leaves the others waiting for it; they have so many seconds to say that they failed in the same way.
GRACE = 5.0
# Ranks wait for the main one while it samples replies or writes a checkpoint.
PATIENCE = timedelta(hours=2)


class Outcome(TypedDict):
    """How a rank ended; `text` for people."""

    kind: Literal["done", "memory", "user", "failed"]
    text: str


def choose_process_count(wanted: Literal["auto"] | int, device: str, step_packs: int) -> Choice:
    """How many processes train: `wanted` is runtime.gpus, `step_packs` the packs of an optimizer step.

    Raises UserError for more GPUs than there are.
    """
    if device == "cpu":
        if wanted not in ("auto", 1):
            raise UserError(f"runtime.gpus: {wanted} were asked for, but training runs on the CPU here; use 'auto'")
        return Choice(1, "on a CPU one process uses all cores")
    cards = graphics_cards.visible_cards()
    visible, kind = len(cards), graphics_cards.alike(cards)
    if wanted != "auto" and wanted > visible:
        raise UserError(f"runtime.gpus: {wanted} were asked for, and torch sees {visible} here; use 'auto' or less")
    count = len(kind) if wanted == "auto" else wanted
    why = f"{'each' if count > 1 else 'one'} of the {visible} GPUs here" if visible > 1 else "one GPU is here"
    if len(kind) < visible:
        others = ", ".join(str(card) for card in cards if card not in kind)
        if count <= len(kind):
            why = (
                f"{count} of the {visible} GPUs here, of one kind ({kind[0]}); a step waits for its slowest card, and "
            )
            why += f"{others} would be that"
        else:
            why += f", of several kinds ({kind[0]}; {others}): a step waits for the slowest, and has to fit into each"
    if count > step_packs:
        return Choice(step_packs, f"{why}, but an optimizer step has no more packs (train.effective_batch_size)")
    return Choice(count, why if wanted == "auto" else f"{why}, as set by runtime.gpus")


def chosen_cards(count: int, cards: tuple[graphics_cards.Card, ...]) -> list[int]:
    """Numbers of the cards that so many processes train on: of one kind, as long as these are enough."""
    kind = graphics_cards.alike(cards)
    return [card.index for card in (kind if count <= len(kind) else cards)[:count]]


def visible_devices(chosen: list[int], visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES with which just the `chosen` of the cards are seen; `visible`: what it is now, if set."""
    names = [name.strip() for name in visible.split(",")] if visible else []
    return ",".join(names[index] if names else str(index) for index in chosen)


def fit_in_processes(job: TrainJob, progress: Progress) -> None:
    """Train in `job.processes` processes on GPUs ("cuda"), or for tests on the "cpu".

    Raises MemoryRanOut and UserError as `fit` does, RuntimeError for any other end.
    """
    count: int = job.processes.value
    with tempfile.TemporaryDirectory(prefix="adder-") as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps(replace(job, threads=max(1, job.threads // count))))
        stopped = _run(folder, count, job.threads, progress)
        outcomes: list[Outcome] = [read_json(path) for path in sorted(folder.glob("outcome-*.json"), key=_age)]
    for kind, error in (("memory", MemoryRanOut), ("user", UserError), ("failed", RuntimeError)):
        for outcome in outcomes:
            if outcome["kind"] == kind:
                raise error(outcome["text"])
    if len(outcomes) < count:
        if stopped:
            raise UserError("told to stop (SIGTERM) before the first step")
        raise RuntimeError("one of the training processes was killed (out of main memory?)")


def _run(folder: Path, processes: int, threads: int, progress: Progress) -> bool:
    """Start the processes and wait for their end; return whether they were told to stop."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(processes), "--module", "adder.training.distributed.launcher", str(folder)]
    with _noting_sigterm() as received:
        torchrun = subprocess.Popen(
            command,
            env=_environment(max(1, threads // processes), processes),
            start_new_session=True,
            preexec_fn=_before_torchrun,
        )
        shown, informed, failed = 0, set[int](), None
        try:
            while torchrun.poll() is None and (failed is None or time.monotonic() < failed + GRACE):
                shown = _show(folder, shown, progress)
                if received:
                    informed |= _pass_sigterm_on(folder, informed)
                if failed is None and any(read_json(p)["kind"] != "done" for p in folder.glob("outcome-*.json")):
                    failed = time.monotonic()
                time.sleep(POLL)
        finally:
            if torchrun.poll() is None:
                torchrun.kill()  # and with it the processes that it started: see die_with_parent
                torchrun.wait()
            _show(folder, shown, progress)
    return bool(received)


def _environment(threads: int, processes: int) -> dict[str, str]:
    """That of the processes: the package can be imported, and torchrun leaves SIGTERM to us."""
    package = str(Path(__file__).parents[3])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
    }
    if torch.cuda.is_available() and not check_cuda_p2p_ib_support():  # else accelerate refuses cards such as RTX 4090
        environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    cards = graphics_cards.visible_cards()
    chosen = chosen_cards(processes, cards)
    if chosen != list(range(processes)) and cards:
        environment[graphics_cards.VISIBLE] = visible_devices(chosen, os.environ.get(graphics_cards.VISIBLE))
    return environment


@contextmanager
def _noting_sigterm() -> Iterator[list[int]]:
    """A list that is no longer empty once this process got SIGTERM (where it may listen)."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    listening = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if listening else None
    try:
        yield received
    finally:
        if listening:
            signal.signal(signal.SIGTERM, before)


def _pass_sigterm_on(folder: Path, done: set[int]) -> set[int]:
    """Send SIGTERM to the processes that have begun and didn't get it yet; return their ids."""
    begun: set[int] = {read_json(path) for path in folder.glob("process-*.json")} - done
    for process in begun:
        os.kill(process, signal.SIGTERM)
    return begun


def _show(folder: Path, shown: int, progress: Progress) -> int:
    """Show what rank 0 has said after its first `shown` lines; return how many lines there are now."""
    file = folder / ProgressFile.NAME
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    for line in lines[shown:]:
        method, arguments = json.loads(line)
        getattr(progress, method)(**arguments)
    return len(lines)


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _before_torchrun() -> None:
    """In torchrun's process, before its program: deaf to SIGTERM, and not to outlive this process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()


# In each of the processes ---------------------------------------------------------------------------------------------


class ProgressFile(Progress):
    """A progress that is shown by the process that started this one."""

    NAME = "progress.jsonl"

    def __init__(self, folder: Path):
        self.file = (folder / self.NAME).open("a", buffering=1)

    def line(self, text: str, last: bool = False, left: float | None = None) -> None:
        """As Progress.line."""
        self._pass_on("line", text=text, last=last, left=left)

    def say(self, text: str) -> None:
        """As Progress.say."""
        self._pass_on("say", text=text)

    def note(self, text: str) -> None:
        """As Progress.note."""
        self._pass_on("note", text=text)

    def fail(self, text: str, lead: str = "cannot go on: ") -> None:
        """As Progress.fail."""
        self._pass_on("fail", text=text, lead=lead)

    def _pass_on(self, method: str, **arguments: Any) -> None:
        self.file.write(json.dumps([method, arguments]) + "\n")


def work(folder: Path) -> None:
    """Train as one of the ranks that torchrun started, and leave word of how it ended."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until training listens
    rank = int(os.environ["RANK"])
    _leave(folder / f"process-{rank}.json", os.getpid())
    progress = ProgressFile(folder) if rank == 0 else Progress.silent()
    outcome = _outcome(pickle.loads((folder / "job").read_bytes()), progress)
    _leave(folder / f"outcome-{rank}.json", outcome)
    if outcome["kind"] != "done":
        os._exit(1)  # at once: leaving the group would wait for the others
    torch.distributed.destroy_process_group()


def _outcome(job: TrainJob, progress: Progress) -> Outcome:
    try:
        _join_group(job.device)
        fit(job, progress)
    except MemoryRanOut as error:
        return Outcome(kind="memory", text=str(error))
    except UserError as error:
        return Outcome(kind="user", text=str(error))
    except Exception as error:
        traceback.print_exc()
        return Outcome(kind="failed", text=f"{type(error).__name__}: {str(error)[:500]}")
    return Outcome(kind="done", text="")


def _join_group(device: str) -> None:
    """Become one of the group of processes, each with a GPU of its own."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)


def _leave(path: Path, content: Outcome | int) -> None:
    """Write a file that whoever looks finds whole or not at all."""
    with atomic_write(path) as partial:
        write_json(partial, content)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
