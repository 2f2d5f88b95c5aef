"""Kill training with -9 at chosen kinds of moment, again and again, and see that it ends with the same adapter.

Usage: python tests/training_kills.py [KILLS, 50 without it]     (a few minutes on two cores; prints one line a life)

A life is one training run that is killed and continued until it finishes; its adapter's bytes must be those of a run
that nobody disturbed. Kills come in turn during a step, a checkpoint write, an evaluation and the final save, each at a
random moment within it, so that files half written and checkpoints not yet sealed are met as well.
"""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adder.training.stage import TrainSettings

ROOT = Path(__file__).resolve().parents[1]

PHASES = ("step", "checkpoint", "evaluation", "final save")
STEPS = 24


def settings(**changes: Any) -> "TrainSettings":
    """Training settings under which every source of chance is on: dropout, shuffled packs, several epochs."""
    from training_stage import train_settings

    values = {
        "epochs": 4,
        "learning_rate": 1e-3,
        "effective_batch_size": 6,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "compute_dtype": "float32",
        "eval_samples": 4,
        "eval_times": 6,
        "samples": 2,
        "keep": "best",
        "reshuffle": True,
    }
    return train_settings(**{**values, **changes})


def announce(phase: str, function: Callable[..., Any], channel: Connection) -> Callable[..., Any]:
    """`function`, telling the parent through `channel` when it begins."""

    def announced(*args: Any, **kwargs: Any) -> Any:
        channel.send(phase)
        return function(*args, **kwargs)

    return announced


def train_once(inputs: dict[str, Path], out: Path, checkpoints: Path, channel: Connection | None = None) -> None:
    """One start of the training stage's function, in this process."""
    from adder.training import lora, trainer
    from training_stage import run_training

    if channel is not None:
        owner = trainer.Trainer
        for phase, name in (("step", "training_step"), ("checkpoint", "_save_checkpoint"), ("evaluation", "evaluate")):
            setattr(owner, name, announce(phase, getattr(owner, name), channel))
        lora.save = announce("final save", lora.save, channel)
    out.mkdir(exist_ok=True)
    run_training(settings(), inputs, out, checkpoints=checkpoints, runtime={"checkpoints": 6})


def start(inputs: dict[str, Path], folder: Path) -> tuple[BaseProcess, Connection]:
    """Fork a start that writes into `folder`; return the process and the end of the pipe that hears its phases."""
    # Forked from a process that has imported everything: a start takes a fraction of a second.
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def quietly() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        train_once(inputs, folder / "out", folder / "checkpoints", there)

    process = context.Process(target=quietly)
    process.start()
    there.close()
    return process, here


def kill_within(process: BaseProcess, channel: Connection, phase: str, occurrence: int, chance: random.Random) -> bool:
    """Kill the process within the `occurrence`-th time that it enters `phase`; False if it ended before."""
    seen = 0
    lengths = {"step": 0.03, "checkpoint": 0.05, "evaluation": 0.03, "final save": 0.008}  # about, in seconds
    try:
        while True:
            seen += channel.recv() == phase
            if seen == occurrence:
                time.sleep(chance.uniform(0, lengths[phase]))
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                return process.exitcode == -signal.SIGKILL
    except EOFError:
        process.join()
        return False


def outcome(folder: Path) -> dict[str, Any]:
    """Digest of each file of the adapter, the sampled replies, and the curves but for the speed."""
    from adder.core.files import digest_file, read_jsonl

    adapter = {path.name: digest_file(path) for path in sorted((folder / "out" / "adapter").iterdir())}
    rows = list(read_jsonl(folder / "out" / "metrics.jsonl"))
    curves = [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
    return {"adapter": adapter, "curves": curves, "samples": list(read_jsonl(folder / "out" / "samples.jsonl"))}


def finish(inputs: dict[str, Path], folder: Path) -> None:
    """Start, and let it train to its end. Raises AssertionError where it fails by itself."""
    process, channel = start(inputs, folder)
    try:
        while True:
            channel.recv()
    except EOFError:
        process.join()
    assert process.exitcode == 0, "a start that nobody disturbed failed"


def live(inputs: dict[str, Path], folder: Path, kills: int, chance: random.Random, done: Counter[str]) -> None:
    """Start, kill and start again until `kills` have been made in this life, then let it finish."""
    made = 0
    while made < kills:
        phase = min(PHASES, key=lambda one: (done[one], PHASES.index(one)))
        process, channel = start(inputs, folder)
        if kill_within(process, channel, phase, chance.randint(1, 3) if phase != "final save" else 1, chance):
            made += 1
            done[phase] += 1
        elif process.exitcode:
            raise AssertionError(f"a start failed by itself with exit code {process.exitcode}")
        else:
            break
    finish(inputs, folder)


def run(kills: int, folder: Path, seed: int = 0, say: Callable[[str], None] = lambda text: None) -> Counter[str]:
    """Make at least `kills` kills over several lives; return how many fell into each phase. Raises AssertionError."""
    from tiny import save_tiny_model, write_training_inputs

    chance = random.Random(seed)
    inputs = write_training_inputs(folder / "inputs", save_tiny_model(folder / "model"))
    (folder / "whole").mkdir()
    finish(inputs, folder / "whole")
    expected = outcome(folder / "whole")
    done: Counter[str] = Counter()
    number = 0
    while done.total() < kills:
        number += 1
        (folder / f"life-{number}").mkdir()
        before = done.total()
        live(inputs, folder / f"life-{number}", min(4, kills - done.total()), chance, done)
        found = outcome(folder / f"life-{number}")
        assert found == expected, f"life {number} ended in another way after {done.total() - before} kills"
        say(f"life {number}: {done.total() - before} kills, the same adapter; so far {dict(done)}")
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        total = run(
            int(sys.argv[1]) if len(sys.argv) > 1 else 50, Path(scratch), say=lambda text: print(text, flush=True)
        )
        print(f"{total.total()} kills ({dict(total)}), every adapter the same; {time.monotonic() - began:.0f} s")
