"""The report's view of the training's health: what the doctor found, advice, and warnings before the first step."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from adder.report.facts import RunFacts
from adder.report.formatting import sentence
from adder.report.page_section import PageSection, RunReport, View
from adder.report.resolved_settings import SettingRow, resolve
from adder.training.monitoring.symptoms import Diagnosis

SEVERITIES = ("stop", "warning", "note")
# A setting by its path, and its value where one stands behind it: a number, or a word that ends there.
SETTING = re.compile(
    r"(?<![\w.])(?:model|data|format|tokenize|lengths|train|merge|evaluate|runtime)\.[a-z][a-z_]*(?!\w|\.\w)"
    r"(?::? -?\d+(?:\.\d+)?(?:e[-+]?\d+)?\b"
    r"|: (?!fewer|more|less|lower|higher)[a-z][\w-]*(?=$|[,;).]| \(| and | or | with ))?"
)
Coded = list[tuple[bool, str]]
"""A text in pieces, each with whether it is a setting, to be set as code."""


class ShownDiagnosis(NamedTuple):
    """A diagnosis as the page shows it, with the settings that it would change."""

    name: str
    severity: str
    step: int | None
    evidence: Coded
    cause: Coded
    change: Coded
    now: list[SettingRow]


def view(run: RunReport) -> View:
    """What was found, the most serious first, with the settings as they are now; advice; the preflight's warnings."""
    facts = run.facts
    return {
        "found": found(facts.diagnoses, resolve(run.settings, facts)),
        "looked_for": looked_for(facts),
        "healthy": not facts.diagnoses and not facts.advice and not facts.preflight_warnings,
        "advice": [with_settings(line) for line in facts.advice],
        "warnings": [with_settings(sentence(line)) for line in facts.preflight_warnings],
    }


def looked_for(facts: RunFacts) -> list[str]:
    """What the doctor has looked for in this training, in words for someone who has never trained a model."""
    logged = bool(facts.curve)
    by_height = logged and facts.records["train"]["settings"].get("loss") != "dft"  # that loss has another scale
    evaluated = sum("eval_loss" in row for row in facts.curve)
    told = (
        (by_height, "a loss that stays flat, climbs, jumps, or is near zero too early"),
        (logged, "numbers that overflow"),
        (by_height, "gradients that explode or vanish"),
        (logged, "labels that are masked"),
        (evaluated > 1, "a held-out loss that rises while the training loss falls"),
        (bool(facts.faults.replies), "replies that are empty, never end, repeat, echo the prompt or are all alike"),
        (bool(facts.sampled) and evaluated > 0, "replies that stay wrong at a good loss"),
        (True, "a learning rate far from what is usual"),
        (True, "steps and batch that don't suit the amount of data"),
    )
    return [words for looked, words in told if looked]


def found(diagnoses: Sequence[Diagnosis], rows: Sequence[SettingRow]) -> list[ShownDiagnosis]:
    """The diagnoses, the most serious first; `rows` are the settings as they are now."""
    # Lists (of sources) would be too long to be read here.
    values = {row["key"]: row for row in rows if not isinstance(row["value"], list | dict)}
    return [
        ShownDiagnosis(
            name=one["name"],
            severity=one["severity"],
            step=one["step"],
            evidence=with_settings(sentence(one["evidence"])),
            cause=with_settings(sentence(one["cause"])),
            change=with_settings(one["change"]),
            now=[values[key] for key in mentioned(one["change"]) if key in values],
        )
        for one in sorted(diagnoses, key=lambda one: SEVERITIES.index(one["severity"]))
    ]


def with_settings(text: str) -> Coded:
    """The text in pieces, each with whether it is a setting, to be set as code."""
    pieces: Coded = []
    end = 0
    for match in SETTING.finditer(text):
        pieces += [(False, text[end : match.start()]), (True, match.group())]
        end = match.end()
    return [(code, piece) for code, piece in [*pieces, (False, text[end:])] if piece]


def mentioned(text: str) -> list[str]:
    """The paths of the settings that the text names, each once."""
    keys = [match.group().split(" ")[0].rstrip(":") for match in SETTING.finditer(text)]
    return list(dict.fromkeys(keys))


SECTION = PageSection(name="doctor", anchor="doctor", title="Doctor", view=view)
