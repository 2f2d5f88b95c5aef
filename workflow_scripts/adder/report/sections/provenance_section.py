"""The report's view of where a run came from and what it cost: files, versions, machines, time, price, energy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adder.core.stage_record import StageRecord
from adder.report import plots
from adder.report.facts import TASK
from adder.report.formatting import duration, energy, number, size
from adder.report.page_section import Figure, PageSection, RunReport, View
from adder.report.resolved_settings import versions
from adder.report.run_metrics import Cost
from adder.report.stage import TaskLimit

# The stages whose files are listed with their digests, as (heading, stage, path or folder with a slash).
FILES = (
    ("Base model", "model", "model/"),
    ("Raw rows", "data", "rows.jsonl"),
    ("Conversations", "format", "train.parquet"),
    ("Conversations", "format", "heldout.parquet"),
    ("Tokens", "tokenize", "train.arrow"),
    ("Tokens", "tokenize", "heldout.arrow"),
    ("Tokenizer", "tokenize", "tokenizer/"),
    ("Packs", "lengths", "packs.parquet"),
    ("Adapter", "train", "adapter/"),
    ("Trained weights", "train", "model/"),
    ("Merged model", "merge", "model/"),
)


# What of a machine tells its energy.
PARTS = {"cpu": "CPU", "memory": "memory", "gpu": "GPU"}


class StageRow(NamedTuple):
    """A stage in the table: what it took, and whether its result was taken from an equal earlier one."""

    name: str
    task: str
    key: str
    path: str
    seconds: float | None
    memory: int | None
    gpu_memory: int | None
    joules: float | None
    restored: bool
    finished_at: str


class FileRow(NamedTuple):
    """A file that decides or is the result."""

    group: str
    path: str
    bytes: int
    digest: str


def view(run: RunReport) -> View:
    """Stages, machines, versions, digests and cost."""
    settings, facts = run.settings, run.facts
    stages = [
        StageRow(
            name=stage,
            task=task_of(stage, settings.tasks),
            key=settings.stages.get(stage, record.get("key", "")),
            path=facts.folders[stage].as_posix(),
            seconds=record.get("seconds"),
            memory=record.get("peak_memory_bytes"),
            gpu_memory=record.get("peak_gpu_memory_bytes"),
            joules=record.get("energy_joules"),
            restored=bool(record.get("restored")),
            finished_at=record.get("finished_at", ""),
        )
        for stage, record in facts.records.items()
    ]
    timed = [
        plots.BarRow(stage.name, stage.seconds, "tuned" if stage.name == "train" else "plain")
        for stage in stages
        if stage.seconds is not None
    ]
    machines = dict.fromkeys(machine(record.get("hardware") or {}) for record in facts.records.values())
    return {
        "model": facts.model,
        "stages": stages,
        "cost": cost_figures(run.metrics["cost"]),
        "plot": plots.bars(timed, duration, "Seconds a stage took"),
        "machines": [text for text in machines if text],
        "versions": versions(facts) | {"lm-eval": facts.tuned.get("lm_eval_version", "–")},
        "files": files(facts.records, facts.folders),
        "sources": [(source["name"], source["sha256"]) for source in facts.data if source["sha256"]],
        "any_restored": any(stage.restored for stage in stages),
        "any_gpu": any(stage.gpu_memory for stage in stages),
        "any_energy": any(stage.joules is not None for stage in stages),
    }


def cost_figures(cost: Cost) -> list[Figure]:
    """Time, price and energy as (name, value, note), with what the latter costs; all but time where it is known."""
    rows = [("Time", duration(cost["total_seconds"]), f"{len(cost['seconds'])} stages, one after another")]
    if price := cost["price"]:
        hourly = money(price["per_hour"], price["currency"])
        rows.append(("Price", money(price["value"], price["currency"]), f"at {hourly} an hour"))
    if used := cost["energy"]:
        known = "all stages" if used["stages"].keys() == cost["seconds"].keys() else ", ".join(used["stages"])
        of = f"of {' and '.join(PARTS.get(part, part) for part in used['parts'])}, " if used["parts"] else ""
        rows.append(("Energy", energy(used["joules"]), f"{of}recorded by {known}"))
        if (cost_of_it := used["price"]) is not None:
            rows.append(("Price of the energy", money(cost_of_it, used["currency"]), "by report.price_per_kwh"))
        if (grams := used["co2_grams"]) is not None:
            rows.append(("CO₂", f"{number(grams)} g", "by report.co2_per_kwh"))
    return rows


def money(value: float, currency: str) -> str:
    """An amount with its currency; small ones with two digits that count."""
    return f"{value:,.2f} {currency}" if value >= 0.1 or value == 0 else f"{number(value)} {currency}"


def task_of(stage: str, tasks: Sequence[TaskLimit]) -> str:
    """The task of a stage such as task_base_0; "" for other stages."""
    match = TASK.fullmatch(stage)
    return tasks[int(match[2])].task if match else ""


def files(records: Mapping[str, StageRecord], folders: Mapping[str, Path]) -> list[FileRow]:
    """The files that decide or are the result."""
    return [
        FileRow(group, f"{folders[stage].as_posix()}/{path}", known["bytes"], known["digest"])
        for group, stage, wanted in FILES
        for path, known in sorted(records[stage]["outputs"].items())
        if path == wanted or (wanted.endswith("/") and path.startswith(wanted))
    ]


def machine(hardware: Mapping[str, Any]) -> str:
    """One line on the machine that a stage ran on."""
    parts = [hardware.get("cpu"), hardware.get("cores") and f"{hardware['cores']} cores"]
    parts.append(hardware.get("memory_bytes") and f"{size(hardware['memory_bytes'])} memory")
    gpu = hardware.get("gpu")
    parts.append(str(gpu.get("name", gpu)) if isinstance(gpu, dict) else gpu)
    return ", ".join(str(part) for part in parts if part)


SECTION = PageSection(name="provenance", anchor="provenance", title="Provenance", view=view)
