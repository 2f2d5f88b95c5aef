"""Every setting of a run with where its value came from, and every choice that its stages made: `run.yaml`."""

from typing import Any, NamedTuple, NotRequired, TypedDict

from adder.report.facts import RunFacts
from adder.report.stage import ReportSettings

# Choices whose name in a stage's file is a setting of this section.
CHOICE_SECTIONS = {"lengths": "lengths", "train": "train", "merge": "merge", "evaluate_tuned": "evaluate"}


class MadeChoice(NamedTuple):
    """A choice that a stage made: the setting it stands for, what was chosen, why, and what else was weighed."""

    key: str
    stage: str
    value: Any
    reason: str
    alternatives: list[dict[str, Any]]


# "from" is a keyword, so these can't be written as classes.
SettingRow = TypedDict("SettingRow", {"key": str, "value": Any, "from": str, "reason": str | None})
SettingRow.__doc__ = """A setting, its value, and whether that was "chosen" or is the "run"'s, "config"'s, "default"."""
SettingRecord = TypedDict("SettingRecord", {"value": Any, "from": str, "reason": NotRequired[str]})
SettingRecord.__doc__ = """A setting as run.yaml has it; a reason only where it was chosen."""


class StagePlace(TypedDict):
    """A stage's key, and its folder."""

    key: str | None
    path: str


class RunYaml(TypedDict):
    """run.yaml: every setting with its value and where it came from, stage keys and paths, versions."""

    run: str
    title: str
    verdict: str
    settings: dict[str, SettingRecord]
    stages: dict[str, StagePlace]
    versions: dict[str, str]


def build_run_yaml(settings: ReportSettings, facts: RunFacts, verdict: str) -> RunYaml:
    """Return what `run.yaml` says; `verdict` is the report's sentence."""
    return {
        "run": settings.run,
        "title": title(settings),
        "verdict": verdict,
        "settings": {row["key"]: _record(row) for row in resolve(settings, facts)},
        "stages": {
            stage: {"key": settings.stages.get(stage), "path": folder.as_posix()}
            for stage, folder in facts.folders.items()
        },
        "versions": versions(facts),
    }


def title(settings: ReportSettings) -> str:
    """The title that the user gave, else the run's name."""
    return settings.title or settings.run


def choices(facts: RunFacts) -> list[MadeChoice]:
    """Every automatic choice, in the order in which they were made."""
    lists: list[tuple[str, str, dict[str, Any]]] = [
        ("lengths", "lengths", {**facts.lengths}),
        ("train", "train", {**facts.train, **facts.plan}),
        ("merge", "merge", {**facts.merge}),
        ("evaluate_tuned", "evaluate", {**facts.tuned}),
    ]
    for stage, contents in facts.other.items():
        lists += [(stage, stage, content) for content in contents.values() if isinstance(content, dict)]
    found: list[MadeChoice] = []
    for stage, section, own in lists:
        for name, value in own.items():
            if isinstance(value, dict) and {"value", "reason"} <= value.keys():
                about = (value["value"], value["reason"], value.get("alternatives", []))
                found.append(MadeChoice(f"{section}.{name}", stage, *about))
    return found


def resolve(settings: ReportSettings, facts: RunFacts) -> list[SettingRow]:
    """Every setting: those that stages chose filled in, choices without a setting added.

    A choice stands for its setting only where that was `auto`: a value that a user gave stays the user's.
    """
    chosen = {choice.key: choice for choice in choices(facts)}
    rows: list[SettingRow] = []
    for row in settings.resolved:
        choice = chosen.pop(row.key, None)
        if choice and row.value == "auto":
            rows.append(_chosen(choice))
        else:
            rows.append({"key": row.key, "value": row.value, "from": row.origin, "reason": None})
    rows += map(_chosen, chosen.values())
    sections = list(dict.fromkeys(row["key"].split(".")[0] for row in rows))
    return sorted(rows, key=lambda row: sections.index(row["key"].split(".")[0]))


def versions(facts: RunFacts) -> dict[str, str]:
    """Package versions of all stages; where stages differ, each version with the stages that used it."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, record in facts.records.items():
        for name, version in (record.get("versions") or {}).items():
            found.setdefault(name, {}).setdefault(str(version), []).append(stage)
    return {
        name: next(iter(by)) if len(by) == 1 else "; ".join(f"{v} ({', '.join(s)})" for v, s in by.items())
        for name, by in sorted(found.items())
    }


def _chosen(choice: MadeChoice) -> SettingRow:
    return {"key": choice.key, "value": choice.value, "from": "chosen", "reason": choice.reason}


def _record(row: SettingRow) -> SettingRecord:
    found: SettingRecord = {"value": row["value"], "from": row["from"]}
    return found if row["reason"] is None else {**found, "reason": row["reason"]}
