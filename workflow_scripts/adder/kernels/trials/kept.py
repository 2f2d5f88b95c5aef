"""What trials found, kept for one machine and the sizes of one model; for any others it is asked again."""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from adder.core.files import atomic_write, read_json, write_json
from adder.core.machine import graphics_cards
from adder.kernels.trials.shapes import ModelShapes
from adder.kernels.trials.trial import KernelFamily, Verdict

# Libraries whose version can change what a kernel computes or how long it takes.
LIBRARIES = ("torch", "triton", "bitsandbytes", "flash-attn", "transformers")


class Machine(TypedDict):
    """What a verdict depends on beside the shapes; `code`: digest of the kernels' source."""

    card: str
    capability: list[int]
    driver: str
    cuda: str | None
    libraries: dict[str, str | None]
    code: str


def this_machine(device: str) -> Machine:
    """The machine and card that a trial on `device` is made with."""
    card = graphics_cards.card(device)
    return {
        "card": card.name,
        "capability": list(card.capability),
        "driver": graphics_cards.driver_version() or "unknown",
        "cuda": graphics_cards.built_for(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "code": code_digest(),
    }


@functools.cache
def code_digest() -> str:
    """Digest of all source of the kernels, trials included."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def path(folder: Path, family: KernelFamily, machine: Machine, shapes: ModelShapes) -> Path:
    """Where a verdict on a family is kept below `folder`."""
    asked = json.dumps([machine, asdict(family.sizes(shapes))], sort_keys=True)
    return folder / f"{family.name}-{hashlib.sha256(asked.encode()).hexdigest()[:20]}.json"


def load(folder: Path, declared: Iterable[KernelFamily], machine: Machine, shapes: ModelShapes) -> dict[str, Verdict]:
    """The verdicts that are kept of these families; a file that can't be read counts as none."""
    found: dict[str, Verdict] = {}
    for family in declared:
        try:
            found[family.name] = Verdict(**read_json(path(folder, family, machine, shapes))["verdict"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return found


def save(
    folder: Path, declared: Iterable[KernelFamily], new: dict[str, Verdict], machine: Machine, shapes: ModelShapes
) -> None:
    """Keep those new verdicts that last; where the folder can't be written to, the next start asks again."""
    for family in declared:
        verdict = new.get(family.name)
        if verdict is None or not verdict.lasting:
            continue
        content = {"machine": machine, "shapes": asdict(family.sizes(shapes)), "verdict": asdict(verdict)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path(folder, family, machine, shapes)) as partial:
                write_json(partial, content)
        except OSError:
            return


def told(folder: Path, card: str) -> list[str]:
    """What the trials that are kept below `folder` found on a card of this name, a line each, newest last."""
    lines: dict[str, None] = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        try:
            content = read_json(file)
            verdict = Verdict(**content["verdict"])
            if content["machine"]["card"] == card:
                of = f"hidden size {content['shapes']['hidden']:,}, {content['shapes']['dtype']}"
                found = "is used" if verdict.used else f"isn't used: a trial {verdict.why}"
                lines[f"{verdict.family} ({of}): {found}"] = None
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return list(lines)
