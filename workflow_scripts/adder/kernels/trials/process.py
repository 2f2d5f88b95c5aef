"""Trials in a process of their own, which may end as it likes: a kernel can poison a CUDA context, crash or hang.

A child tries one family after the other and writes what it begins and what it finds, line by line. After anything that
was raised it ends, since its context may be of no use any more, and another child goes on with what is left.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from adder.core.parallel import die_with_parent
from adder.kernels import families
from adder.kernels.trials.shapes import ModelShapes
from adder.kernels.trials.trial import KernelFamily, Verdict, in_words, try_family

# Seconds that a family may take, compilation included: FlexAttention's takes a minute on slow hosts.
LIMIT = 300.0
# Seconds that a child may take to import torch and to get at the card.
STARTING = 600.0
POLL = 0.1  # seconds between looks at a child


class NoChild(Exception):
    """No child could be started, or it ended before its first trial; the message says how."""


def try_in_children(
    source: str, names: Sequence[str], known: Mapping[str, Verdict], shapes: ModelShapes, device: str, limit: float
) -> dict[str, Verdict]:
    """Try families in child processes; return the verdicts that are new.

    source: "module:function:argument", where the child finds the families; names: those to try, in this order; known:
    verdicts on others that hold already. Raises NoChild where the machine lets no second process use the card.
    """
    found: dict[str, Verdict] = {}
    while left := [name for name in names if name not in found]:
        more = _one_child(source, left, {**known, **found}, shapes, device, limit)
        found |= more
    return found


def _one_child(
    source: str, names: Sequence[str], known: Mapping[str, Verdict], shapes: ModelShapes, device: str, limit: float
) -> dict[str, Verdict]:
    """What one child finds, at least one verdict: on the family that it ended with, if it didn't end well."""
    with tempfile.TemporaryDirectory(prefix="adder-trials-") as name:
        folder = Path(name)
        request = {"source": source, "names": list(names), "shapes": asdict(shapes), "device": device}
        request["known"] = [asdict(verdict) for verdict in known.values()]
        (folder / "request.json").write_text(json.dumps(request))
        ending = _run(folder, limit)
        lines = _lines(folder / "found.jsonl")
        verdicts = [Verdict(**line["verdict"]) for line in lines if "verdict" in line]
        begun: str | None = lines[-1].get("begin") if lines else None
        if begun is not None:
            verdicts.append(Verdict(begun, "died", f"ended its process: {ending}"))
        if not verdicts:
            raise NoChild(f"{ending}: {_last_words(folder / 'output.txt')}")
        return {verdict.family: verdict for verdict in verdicts}


def _run(folder: Path, limit: float) -> str:
    """Run a child to its end; return how it ended, in words. One that is silent for `limit` seconds is killed."""
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with (folder / "output.txt").open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "adder.kernels.trials.process", str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        try:
            size, since = -1, time.monotonic()
            while child.poll() is None:
                file = folder / "found.jsonl"
                now = file.stat().st_size if file.exists() else 0
                if now != size:
                    size, since = now, time.monotonic()
                allowed = limit if now else STARTING
                if time.monotonic() - since > allowed:
                    return f"it didn't finish within {allowed:.0f} seconds"
                time.sleep(POLL)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return _ending(child.returncode)


def _ending(status: int) -> str:
    if status >= 0:
        return f"it exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"it was killed by signal {name}"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines: a child may die while it writes one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _last_words(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


def try_one_by_one(
    declared: Sequence[KernelFamily],
    known: Mapping[str, Verdict],
    shapes: ModelShapes,
    device: str,
    begin: Callable[[str], object] = lambda name: None,
    found: Callable[[Verdict], object] = lambda verdict: None,
) -> dict[str, Verdict]:
    """Try families in this process, in order, each with those before it as they were found; return the verdicts.

    A family that stands after one that is used isn't tried, and has no verdict that lasts. `begin` and `found` are told
    what goes on; where `found` returns True, nothing more is tried.
    """
    verdicts = dict(known)
    new: dict[str, Verdict] = {}
    apply(verdicts.values())
    for family in declared:
        if family.name in verdicts:
            continue
        begin(family.name)
        preferred = verdicts.get(family.after) if family.after else None
        if preferred is not None and (preferred.used or preferred.outcome == "unneeded"):
            verdict = Verdict(family.name, "unneeded", "another is preferred, and works")
        else:
            verdict = try_family(family, shapes, device)
        verdicts[family.name] = new[family.name] = verdict
        apply([verdict])
        if found(verdict):
            break
    return new


def apply(verdicts: Any) -> None:
    """Let this process use what was found to be right, and nothing else."""
    for verdict in verdicts:
        if verdict.used:
            families.trust(verdict.family)
        else:
            families.turn_off(verdict.family, verdict.why)


def _child(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    declared = find(request["source"])
    chosen = [family for family in declared if family.name in request["names"]]
    known = {verdict["family"]: Verdict(**verdict) for verdict in request["known"]}
    device = request["device"]
    if device != "cpu":
        import torch

        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # where the card is for one process alone, this says so
    with (folder / "found.jsonl").open("a", buffering=1) as file:

        def begin(name: str) -> None:
            file.write(json.dumps({"begin": name}) + "\n")

        def found(verdict: Verdict) -> bool:
            file.write(json.dumps({"verdict": asdict(verdict)}) + "\n")
            return verdict.outcome == "raised"

        try_one_by_one(chosen, known, ModelShapes(**request["shapes"]), device, begin, found)
    os._exit(0)  # a poisoned context may not let Python end


def find(source: str) -> list[KernelFamily]:
    """The families of "module:function:argument"."""
    module, function, argument = source.split(":")
    return getattr(import_module(module), function)(argument)


if __name__ == "__main__":
    try:
        _child(Path(sys.argv[1]))
    except Exception as problem:
        print(in_words(problem), file=sys.stderr, flush=True)
        os._exit(1)
