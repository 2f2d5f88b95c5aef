"""The report's view of the evaluation: scores with their intervals, fields, tasks and the guard, a judge's verdict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from adder.core.intervals import Change, Word
from adder.evaluation.metrics import SCORES
from adder.evaluation.records import Judgement
from adder.evaluation.tasks.records import TaskSample
from adder.report import plots, regression_guard
from adder.report.facts import Paired, RunFacts, TaskFacts
from adder.report.formatting import clip, gist, number, percent
from adder.report.page_section import Figure, PageSection, RunReport, View
from adder.report.run_metrics import TaskMetrics
from adder.report.scores import ComparedField, Comparison, FieldScore, ShownScore, TaskComparison, exponential_of
from adder.report.sections.samples_section import Pieces, mark, reference_text, turn_text

Show = Callable[[float | None], str]
LONGEST_TEXT = 1500  # characters of a task's or judgement's text that are shown
SHOWN_LOSSES = 4  # documents of a task at which the tuned model did worse
SHOWN_JUDGEMENTS = 9
# How a pair of replies fared, in the order in which a doubting reader wants to see them.
OUTCOMES = {
    "loss": ("base preferred", "bad"),
    "inconsistent": ("order decides", "unsure"),
    "tie": ("tie", "calm"),
    "win": ("tuned preferred", "good"),
}


# The colour of a difference; none where it may be chance or doesn't matter.
TONES: dict[Word | None, str] = {"better": "good", "worse": "bad"}


class Cell(NamedTuple):
    """A score and both ends of its interval, in words."""

    value: str
    ci: list[str] | None


class ComparedRow(NamedTuple):
    """What all tables of base against tuned have in common."""

    base: Cell | None
    tuned: Cell | None
    n: int | None
    difference: str | None
    ci: list[str] | None
    p: str | None
    tone: str
    word: str


class FieldCell(NamedTuple):
    """The tuned model's score of a field, and the difference to its base where both have one."""

    value: str
    difference: str | None
    ci: list[str] | None
    tone: str


def view(run: RunReport) -> View:
    """Scores in numbers, fields, tasks, judge, and how the replies came about."""
    facts, metrics = run.facts, run.metrics
    return {
        "scores": score_rows(metrics["heldout"]),
        "chosen": facts.tuned["metrics"]["reason"],
        "smallest": smallest_in_words(metrics["heldout"]),
        "rows": len(facts.samples),
        "groups": metrics["verdict"]["groups"],
        "heldout": metrics["data"]["heldout"],
        "generation": {"base": facts.base.get("generation"), "tuned": facts.tuned.get("generation")},
        "limit": facts.tuned.get("max_new_tokens"),
        "fields": field_rows(metrics["fields"]),
        "tasks": task_rows(facts.tasks, metrics["tasks"]),
        "guard": metrics["guard"] and regression_guard.check(metrics["tasks"])["sentence"],
        "judge": judge_view(facts),
    }


def smallest_in_words(heldout: Mapping[str, Comparison]) -> str:
    """The smallest difference that matters, of each score that has one of its own."""
    shown = {
        name: change(entry["smallest_difference"], SCORES[name].is_share).lstrip("+")
        for name, entry in heldout.items()
        if exponential_of(name) is None
    }
    return ", ".join(f"{SCORES[name].spoken} {value}" for name, value in shown.items())


def write_score(name: str, value: float | None) -> str:
    """A held-out score as a percentage or as a number, as its kind wants."""
    return percent(value) if SCORES[name].is_share else number(value)


def change(value: float | None, share: bool, unit: bool = True) -> str:
    """A signed difference; of shares in percentage points."""
    if value is None:
        return "–"
    text = f"{value * 100:+z.1f}" if share else ("+" if value > 0 else "") + number(value)
    return text.replace("-", "−") + (" points" if share and unit else "")


def bounds(difference: Change | None, share: bool) -> list[str] | None:
    """Both ends of a difference's interval, in words; None without an interval."""
    ends = difference and difference["ci95"]
    return [change(end, share, unit=False) for end in ends] if ends else None


def score_rows(heldout: Mapping[str, Comparison]) -> list[View]:
    """The held-out scores as rows of a table: what each means, both values, the difference, how sure, on how many."""
    rows = []
    for name, entry in heldout.items():
        score = SCORES[name]
        about = {"name": score.label, "note": score.meaning, "unit": score.unit}
        rows.append({**about, **compared_score(name, entry)._asdict()})
    return rows


def compared_score(name: str, entry: Comparison) -> ComparedRow:
    """A held-out score as a row of a table."""
    score = SCORES[name]
    return compared_row(entry, score.is_share, percent if score.is_share else number)


def compared_row(entry: Comparison | TaskComparison, share: bool, show: Show) -> ComparedRow:
    """What all tables of base against tuned have in common, of one comparison."""
    base, tuned, difference = entry["base"], entry["tuned"], entry["difference"]
    if share and base and tuned and base["value"] == tuned["value"] == 0:
        # Of nothing at all no interval of a difference is of use: either the task or the score doesn't fit.
        return ComparedRow(value_cell(base, show), value_cell(tuned, show), tuned["n"], None, None, None, "", "both 0")
    return ComparedRow(
        base=base and value_cell(base, show),
        tuned=tuned and value_cell(tuned, show),
        n=next((score["n"] for score in (base, tuned) if score), None),
        difference=difference and change(difference["value"], share),
        ci=bounds(difference, share),
        p=difference and probability(difference["p"]),
        tone=TONES.get(entry["verdict"], ""),
        word=entry["verdict"] or "–",
    )


def value_cell(score: ShownScore, show: Show) -> Cell:
    """A score and both ends of its interval, in words."""
    ci = score["ci95"]
    return Cell(show(score["value"]), [show(end) for end in ci] if ci else None)


def probability(p: float | None) -> str:
    """A p-value; of a sampled test only so many digits are worth saying."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def field_rows(fields: Mapping[str, ComparedField]) -> list[View]:
    """One row a field: scores of base and tuned, and both F1 on one line."""
    return [_field_row(name, scores) for name, scores in fields.items()]


def _field_row(name: str, scores: ComparedField) -> View:
    base, tuned = scores["base"]["f1"], scores["tuned"]["f1"]
    label = f"F1 of base {percent(base)} and tuned {percent(tuned)}"
    return {
        "name": name,
        "n": scores["tuned"]["n"],
        "base_f1": percent(base),
        "precision": field_cell(scores, "precision"),
        "recall": field_cell(scores, "recall"),
        "f1": field_cell(scores, "f1"),
        "word": scores["verdict"]["f1"],
        "plot": plots.pair(base, tuned, label),
    }


def field_cell(scores: ComparedField, score: FieldScore) -> FieldCell:
    """A score of one field."""
    found = scores["difference"][score]
    return FieldCell(
        value=percent(scores["tuned"][score]),
        difference=found and change(found["value"], True, unit=False),
        ci=bounds(found, True),
        tone=TONES.get(scores["verdict"][score], ""),
    )


def task_rows(tasks: Sequence[TaskFacts], compared: Sequence[TaskMetrics]) -> list[View]:
    """One row a task, with the guard's word and some documents at which the tuned model did worse."""
    span = max([0.05, *(end for row in compared if is_share(row) for end in _ends(row))])
    return [_task_row(task, row, span) for task, row in zip(tasks, compared, strict=True)]


def _task_row(task: TaskFacts, row: TaskMetrics, span: float) -> View:
    share, found, drop, higher = is_share(row), row["difference"], row["max_drop"], row["higher_is_better"]
    show = percent if share else number
    limit = None if drop is None else -drop if higher else drop
    ends = bounds(found, share)
    interval = f", 95 % CI {ends[0]} to {ends[1]}" if ends else ""
    label = f"{row['task']}: {change(found['value'], share)}{interval}"
    return {
        "name": row["task"],
        "metric": row["metric"],
        "higher": higher,
        "few": row["num_fewshot"],
        "version": row["version"],
        "of": task.tuned["limit"],
        "guard": row["guard"],
        "drop": drop is not None and change(drop, share).lstrip("+"),
        "plot": plots.change(found, limit, span * 1.05, label) if share else "",
        **compared_row(row, share, show)._asdict(),
        "as_chat": task.tuned["chat_template"],
        "cut": task.tuned["prompts_cut"],
        "subtasks": subtasks(task, show),
        **documents(task.samples, row["metric"], higher),
    }


def subtasks(task: TaskFacts, show: Show) -> list[tuple[str, int, str, str]]:
    """(name, documents, base, tuned) of each member of a group of tasks; none for a single task."""
    base, tuned = task.base["subtasks"] or {}, task.tuned["subtasks"] or {}
    return [(name, found["n"], show(base[name]["value"]), show(found["value"])) for name, found in tuned.items()]


def is_share(row: TaskComparison) -> bool:
    """Whether a task's score is a share of something: higher is better and both lie between 0 and 1."""
    values = (row["base"]["value"], row["tuned"]["value"])
    return row["higher_is_better"] and all(value is not None and 0 <= value <= 1 for value in values)


def _ends(row: TaskComparison) -> list[float]:
    found = row["difference"]
    return [abs(end) for end in (found["value"], *(found["ci95"] or []), row["max_drop"] or 0)]


def documents(samples: Sequence[Paired[TaskSample]], metric: str, higher: bool) -> View:
    """How many documents got better and worse, and the first few of the latter. One may have no reply, only a score."""
    gains = [(one.tuned[metric] - one.base[metric]) * (1 if higher else -1) for one in samples]
    lost = [one for one, gain in zip(samples, gains, strict=True) if gain < 0]
    return {
        "gained": sum(gain > 0 for gain in gains),
        "lost": len(lost),
        "examples": [
            {
                "id": one.id,
                "prompt": clip(one.tuned["prompt"], LONGEST_TEXT),
                "reference": clip(one.tuned["reference"], LONGEST_TEXT),
                "replies": [
                    (who, clip(row["reply"] or "", LONGEST_TEXT), number(row[metric]))
                    for who, row in (("base", one.base), ("tuned", one.tuned))
                ],
            }
            for one in lost[:SHOWN_LOSSES]
        ],
    }


def judge_view(facts: RunFacts) -> View | None:
    """What the judge said: the bar of wins, ties and losses, key figures, and some of its judgements."""
    judge = facts.judge
    if judge is None:
        return None
    rate = judge["win_rate"]
    parts = [
        plots.Part("tuned preferred", judge["wins"], "tuned"),
        plots.Part("tie", judge["ties"], "tie"),
        plots.Part("base preferred", judge["losses"], "base"),
    ]
    ends = " to ".join(map(percent, rate["ci95"])) if rate["ci95"] else ""
    figures: list[Figure] = [
        ("Win rate", percent(rate["value"]), f"95 % CI {ends}; ties count half" if ends else "ties count half"),
        ("Pairs", f"{judge['pairs']:,}", "each asked in both orders, blind"),
        ("Order decided", f"{judge['inconsistent']:,}", "pairs in which the orders disagree, counted as ties"),
        ("No answer", f"{judge['failed']:,}", "pairs left out"),
        ("p", probability(judge["p"]), "of a difference as large by chance"),
    ]
    return {
        **{name: judge[name] for name in ("model", "base_url", "criteria", "sentence", "verdict")},
        "parts": parts,
        "plot": plots.stacked(parts, f"{judge['wins']} wins, {judge['ties']} ties, {judge['losses']} losses"),
        "figures": figures,
        "tone": {"better": "good", "worse": "bad"}.get(judge["verdict"], "unsure"),
        "judgements": judgements(facts.judgements),
    }  # fmt: skip


def judgements(rows: Sequence[Judgement]) -> list[View]:
    """A few judgements of each outcome, those that speak against the tuned model first."""
    by_outcome: dict[str, list[Judgement]] = {name: [] for name in OUTCOMES}
    for row in rows:
        by_outcome[outcome(row)].append(row)
    each = max(1, SHOWN_JUDGEMENTS // max(1, sum(map(bool, by_outcome.values()))))
    return [_judgement(name, row) for name, found in by_outcome.items() for row in found[:each]]


def _judgement(name: str, row: Judgement) -> View:
    """A judgement as the page shows it; `name`: of its outcome."""
    outcome_label, colour = OUTCOMES[name]
    replies: list[tuple[str, Pieces]] = [
        (who, mark(row["reference"], reply, reply == row["reference"])[0])
        for who, reply in (("base", row["base"]), ("tuned", row["tuned"]))
    ]
    return {
        "id": row["id"],
        "outcome": outcome_label,
        "tone": colour,
        "gist": gist(turn_text(row["prompt"][-1])),
        "turns": [{"role": turn["role"], "content": clip(turn_text(turn), LONGEST_TEXT)} for turn in row["prompt"]],
        "reference": reference_text(row["reference"]),
        "replies": replies,
        "said": list(zip((row["first"], row["second"]), row["reasons"], strict=True)),
    }


def outcome(row: Mapping[str, Any]) -> str:
    """What the judge's two answers on a pair come to, as a key of OUTCOMES."""
    if row["first"] != row["second"]:
        return "inconsistent"
    return {"tuned": "win", "base": "loss", "tie": "tie"}[row["first"]]


SECTION = PageSection(name="evaluation", anchor="evaluation", title="Evaluation", view=view)
