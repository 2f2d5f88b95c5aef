"""How long the stages of a run will take, from what the records of earlier ones say.

A stage's work is counted in units of its own (rows, tokens times parameters), from its settings and from what its
parents found. Its seconds are those of the latest finished stage of its kind on this machine, by the ratio of their
units. Where there is none, they are those that were measured on the machine below, by the ratio that the stages of this
run that have finished took to theirs.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adder.core import hardware
from adder.core.stage_record import StageRecord
from adder.workflow.stage_runner import RECORD, read_record

# Seconds a unit, and beside them, of each kind of stage in the default run: an Intel Xeon with AMX, two cores, nothing
# else on it. What a stage takes beside its work is mostly the import of its libraries.
MEASURED: Mapping[str, tuple[float, float]] = {
    "model": (0.0, 35.0),
    "data": (1e-5, 0.3),
    "format": (4e-4, 0.3),
    "tokenize": (1.5e-3, 3.5),
    "lengths": (1e-5, 0.4),
    "isolation": (0.0, 9.0),
    "train": (3.6e-11, 30.0),
    "merge": (4.5e-7, 10.0),
    "evaluate": (1.4e-11, 6.0),
    "evaluate merge": (0.6e-11, 6.0),
    "task": (0.0, 60.0),
    "judge": (0.0, 60.0),
    "report": (0.0, 1.5),
    "gguf": (2e-8, 3.0),
}
UNKNOWN_STAGE = (0.0, 10.0)
# Those whose time goes by what the machine computes, which is what makes machines differ; and from which of their
# seconds on they tell something about it.
COMPUTING, TELLING = ("isolation", "train", "merge", "evaluate", "task"), 5.0
# What Snakemake and a new Python take around a stage.
AROUND = 2.5
MOST_RECORDS = 300

Summaries = Mapping[str, Mapping[str, Any]]
"""The summaries of the stages above one, by stage."""


def units(stage: str, settings: Mapping[str, Any], above: Summaries) -> float | None:
    """How much there is for a stage to do: rows, examples, parameters, or tokens times parameters.

    None where that can't be known yet or isn't counted.
    """
    try:
        if stage == "format":
            return float(above["data"]["rows"])
        if stage == "tokenize":
            return float(above["format"]["train"] + above["format"]["heldout"])
        if stage == "lengths":
            return float(above["tokenize"]["counts"]["train"]["examples"])
        if stage in ("merge", "gguf"):
            return float(above["model"]["parameters"])
        if stage == "train":
            return float(
                above["tokenize"]["counts"]["train"]["tokens"] * settings["epochs"] * above["model"]["parameters"]
            )
        if stage == "evaluate":
            counts = above["tokenize"]["counts"]["heldout"]
            share = min(1.0, (settings["max_samples"] or counts["examples"]) / max(counts["examples"], 1))
            return float(counts["tokens"] * share * above["model"]["parameters"])
    except (KeyError, TypeError):
        pass
    return None


def kind(stage: str, above: Iterable[str]) -> str:
    """What takes comparable times: a tuned model replies otherwise than its base."""
    return f"{stage} merge" if stage == "evaluate" and "merge" in above else stage


@dataclass
class Times:
    """What finished stages took.

    machine: that whose records count (see machine_of); None for all.
    """

    machine: tuple[Any, ...] | None = None
    records: list[StageRecord] = field(default_factory=list)
    of_output: dict[str, list[StageRecord]] = field(default_factory=lambda: defaultdict(list))
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of the stages that finished in this run: seconds taken, and seconds by MEASURED."""
    has_computed: bool = False
    """Whether one that computes is among these, so that they tell how fast this machine is."""

    def read(self, results: Path) -> None:
        """Read the records of all results that are kept."""
        files = sorted((results / "cache").glob(f"*/[!.]*/{RECORD}"), key=_modified)[-MOST_RECORDS:]
        for record in filter(None, (read_record(file.parent) for file in files)):
            self.add(record)

    def add(self, record: StageRecord) -> None:
        """Take notice of a finished stage, the latest last."""
        self.records.append(record)
        for path, known in record["outputs"].items():
            self.of_output[f"{path} {known['digest']}"].append(record)

    def above(self, record: StageRecord) -> dict[str, Mapping[str, Any]]:
        """The summaries of all stages that a finished one goes back to."""
        found: dict[str, Mapping[str, Any]] = {}
        waiting = [record]
        while waiting:
            for files in waiting.pop()["inputs"].values():
                for parent in self._parent(files):
                    if parent["stage"] not in found:
                        found[parent["stage"]] = parent["summary"]
                        waiting.append(parent)
        return found

    def _parent(self, files: Mapping[str, str]) -> list[StageRecord]:
        """The stage that wrote these files, {path: digest}: a merged model has some that its base has too."""
        wrote = [self.of_output.get(f"{path} {digest}", ()) for path, digest in files.items()]
        found = Counter(record["fingerprint"] for records in wrote for record in records)
        best = max(found, key=lambda one: found[one], default=None)
        return [next(one for records in wrote for one in records if one["fingerprint"] == best)] if best else []

    def estimate(
        self, stage: str, settings: Mapping[str, Any], above: Summaries, names: Iterable[str] = ()
    ) -> tuple[float, bool]:
        """Seconds that a stage will take, and whether that is by one of its kind that was finished on this machine.

        above: of the stages above it that have finished; names: of all of them.
        """
        own = kind(stage, {*above, *names})
        wanted = units(stage, settings, above)
        for record in reversed(self.records):
            if record["stage"] != stage or self.machine not in (None, machine_of(record)):
                continue
            earlier = self.above(record)
            if kind(stage, earlier) == own:
                found = units(stage, record["settings"], earlier)
                ratio = wanted / found if wanted and found else 1.0
                fixed = _beside(record, own, earlier)
                return fixed + (record["seconds"] - fixed) * ratio, True
        return _measured(own, units(stage, settings, above)) * self.factor(stage), False

    def note(self, record: StageRecord) -> None:
        """A stage has finished in this run."""
        self.add(record)
        if record["stage"] not in COMPUTING or record["restored"]:
            return
        if record["hardware"].get("gpu") and not MEASURED[record["stage"]][0]:  # mostly start-up, beside a GPU's pace
            return
        self.has_computed = True
        if record["seconds"] >= TELLING:
            above = self.above(record)
            wanted = units(record["stage"], record["settings"], above)
            expected = _measured(kind(record["stage"], above), wanted)
            self.ratios[record["fingerprint"]] = (record["seconds"], expected)

    def factor(self, stage: str) -> float:
        """How much longer this machine takes than MEASURED, as far as this run has shown."""
        if stage not in COMPUTING or not self.ratios:
            return 1.0
        taken, expected = (sum(column) for column in zip(*self.ratios.values(), strict=True))
        return taken / expected


def _beside(record: StageRecord, own: str, above: Summaries) -> float:
    """Seconds that a stage took beside its work: of a training all but its steps, of others what they mostly take."""
    speed = record["summary"].get("tokens_per_second")
    try:
        tokens = above["tokenize"]["counts"]["train"]["tokens"] * record["settings"]["epochs"]
        if speed:
            return max(record["seconds"] - tokens / speed, 0.0)
    except (KeyError, TypeError):
        pass
    return min(MEASURED.get(own, UNKNOWN_STAGE)[1], record["seconds"])


def is_counted(stage: str, settings: Mapping[str, Any], above: Summaries) -> bool:
    """Whether it is known how much a stage that computes has to do, where that decides how long it takes."""
    grows = MEASURED.get(stage, UNKNOWN_STAGE)[0] > 0
    return stage not in COMPUTING or not grows or units(stage, settings, above) is not None


def _measured(kind: str, units: float | None) -> float:
    each, beside = MEASURED.get(kind, UNKNOWN_STAGE)
    return beside + each * (units or 0.0)


def machine_of(record: StageRecord) -> tuple[Any, ...]:
    """What of a machine makes times comparable, as far as a process can tell that hasn't loaded torch."""
    return record["hardware"]["cpu"], record["hardware"]["cores"]


def this_machine() -> tuple[Any, ...]:
    """The machine_of this process."""
    found = hardware.describe()
    return found["cpu"], found["cores"]


def together(seconds: Mapping[str, float], parents: Mapping[str, Iterable[str]], at_once: int) -> float:
    """Seconds until all stages are done, {name: seconds}: one after the other, or `at_once` of them as far as what they
    read allows.
    """
    if at_once <= 1 or not seconds:
        return sum(seconds.values())
    ends: dict[str, float] = {}

    def end(name: str) -> float:
        if name not in ends:
            ends[name] = seconds.get(name, 0.0) + max((end(parent) for parent in parents.get(name, ())), default=0.0)
        return ends[name]

    return max(max(map(end, seconds)), sum(seconds.values()) / at_once)


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
