"""All runs of a configuration on one page and in one table: which to use, how sure that is, and what it cost.

`facts` reads the runs and compares them, `sentences` has the words, `plots` the plots; this module makes `compare.html`
and `compare.csv` of them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from adder.evaluation.metrics import SCORES
from adder.report.comparison import plots
from adder.report.comparison.facts import Comparison, Difference, RankedRun, RunScore, TaskScore, compare
from adder.report.comparison.sentences import advice, change, lower, money, sentence, spent
from adder.report.formatting import in_words, number, percent, setting
from adder.report.html_page import render
from adder.report.page_section import View
from adder.report.sections.evaluation_section import write_score

COLOURS = 8  # runs that have a colour of their own; further ones are grey
MAX_AXES = 8  # settings that parallel coordinates show
SMOOTHED = 60  # a training curve is shown as medians over a 60th of its steps: single steps of many runs are a thicket
WORDS = 32  # characters of a setting's value in a table: longer ones would push the figures off the screen


class Cell(NamedTuple):
    """A cell of the table of runs: its text, what it sorts by, and what it says under the pointer."""

    text: str
    value: float | None
    title: str


class SettingCell(NamedTuple):
    """A setting's value in the table, what it sorts by, and what it says under the pointer: all of it, its origin."""

    text: str
    value: float | None
    title: str


class Findings(NamedTuple):
    """What the doctor found in a run: how many, their names, and the colour of the worst."""

    number: int
    names: str
    tone: str


def run(
    runs: Mapping[str, Mapping[str, Path]], out: Path, unfinished: Mapping[str, str] = MappingProxyType({})
) -> Comparison:
    """Write `compare.html` and `compare.csv` into `out`; return what they show.

    `runs`: for each run the finished folders of its stages, under the names by which the report knows them, and that
    of `report` itself. `unfinished`: why the other runs of the configuration have none, by run. Raises UserError where
    a folder is incomplete or the runs have no score in common.
    """
    found = compare(runs)
    view = build_view(found) | {"unfinished": list(unfinished.items())}
    page, rows = render("compare", view, ("report.css", "compare.css")), table(found)
    (out / "compare.html").write_text(page, encoding="utf-8")
    (out / "compare.csv").write_text(rows, encoding="utf-8")
    return found


def build_view(found: Comparison) -> View:
    """Return everything that the template shows, by section."""
    runs, score = found.runs, SCORES[found.metric]
    several = len(runs) > 1
    return {
        "title": f"{len(runs)} runs compared" if several else f"One run: {runs[0].name}",
        "about": about(found),
        "tone": tone(found),
        "sentence": sentence(found),
        "advice": advice(found),
        "several": several,
        "many": len(runs) > plots.MANY,
        "metric": {"name": score.label, "better": score.better},
        "paired": found.paired,
        "legend": [{"run": place, "kind": kind(place), "name": run.name} for place, run in enumerate(runs)],
        "coloured": COLOURS,
        "table": rows(found),
        "curves": curves(runs),
        "parallel": parallel(found),
        "cost": cost_plot(found),
        "chosen": chosen(found),
    }


def about(found: Comparison) -> list[tuple[str, str]]:
    """The line under the title: what the runs are judged by and in what they differ."""
    metric, keys = SCORES[found.metric], found.differing.set
    held = f"the same {found.rows:,}" if found.rows is not None else "not the same in all runs"
    named = ", ".join(map(spoken, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    return [
        ("Judged by", lower(metric.label) + (f", {metric.unit}" if metric.unit else "")),
        ("Held-out rows", held),
        ("Settings that differ", named or "none"),
    ]


def tone(found: Comparison) -> str:
    """The verdict's colour: where one model is surely the best, that of how it does against its base."""
    verdict = found.verdict
    if verdict.word == "refused":
        return "worse"
    best, others = found.runs[0], found.runs[1:]
    paired = all(run.against_best and run.against_best.paired for run in others)
    word = best.verdict["verdict"]
    doubtful = word not in ("better", "worse") or (word == "better" and best.verdict["doubts"])
    return "unsure" if doubtful or not paired or verdict.same_model != verdict.rivals else word


def rows(found: Comparison) -> View:
    """The table of runs: {settings: [(key, short name)], scores and tasks: [names], axis: its ends, priced, rows}."""
    runs, main = found.runs, found.metric
    others = [metric for metric in SCORES if metric != main and any(metric in run.scores for run in runs)]
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    keys = found.differing.set
    low, high = axis_ends(runs, SCORES[main].is_share)
    made = [
        {
            **_shown_run(found, place, one, low, high),
            "scores": [_score(one.scores.get(metric), metric) for metric in others],
            "tasks": [_task(one.tasks.get(task)) for task in tasks],
            "settings": [_setting(one, key) for key in keys],
        }
        for place, one in enumerate(runs)
    ]
    return {
        "settings": [(key, short_name(key)) for key in keys],
        "scores": [SCORES[metric].label for metric in others],
        "tasks": tasks,
        "axis": (write_score(main, low), write_score(main, high)),
        "priced": any(row["price"] for row in made),
        "rows": made,
    }


def axis_ends(runs: Sequence[RankedRun], share: bool) -> tuple[float, float]:
    """Where the axis of all runs' intervals begins and ends."""
    ends = [end for run in runs for end in (run.score["ci95"] or [run.score["value"]])]
    room = (max(ends) - min(ends)) * 0.05 or abs(ends[0]) * 0.1 or 1.0
    low = max(0.0, min(ends) - room) if min(ends) >= 0 else min(ends) - room
    high = max(ends) + room
    return low, min(1.0, high) if share else high


def _shown_run(found: Comparison, place: int, one: RankedRun, low: float, high: float) -> View:
    """What the table says of a run in all comparisons; `low` and `high`: ends of the axis."""
    main, score = found.metric, one.score
    show = partial(write_score, main)
    base = one.base[main]["value"] if main in one.base else None
    interval = [show(end) for end in score["ci95"]] if score["ci95"] else None
    text = f"{one.name}: {show(score['value'])}"
    text += f", 95 % interval {interval[0]} to {interval[1]}" if interval else ""
    text += f"; base {show(base)}" if base is not None else ""
    verdict = one.verdict
    return {
        "run": place,
        "kind": kind(place),
        "name": one.name,
        "link": f"./{quote(one.name)}/report.html",
        "base_drawn": base is not None and low <= base <= high,
        "value": score["value"],
        "score": show(score["value"]),
        "interval": interval,
        "plot": plots.interval(score, base, low, high, text),
        "status": status(found, one),
        "against": one.against_best and against(one.against_best, main),
        "seconds": one.cost.seconds,
        "price": money(one.cost),
        "price_value": one.cost.price,
        "steps": one.steps,
        "base": verdict["verdict"],
        "base_tone": base_tone(one),
        "sentence": verdict["sentence"],
        "base_by": "" if verdict["metric"] == main else SCORES[verdict["metric"]].label.lower(),
        "findings": findings(one),
    }


def base_tone(one: RankedRun) -> str:
    """The colour of what a run's report says of it against its base: green only where nothing stands against that."""
    against = one.verdict["doubts"] or (one.guard and not one.guard["passed"])
    return {"better": "unsure" if against else "good", "worse": "bad"}.get(one.verdict["verdict"], "unsure")


def status(found: Comparison, one: RankedRun) -> tuple[str, str]:
    """What the table says of a run beside its score, and in which colour."""
    verdict = found.verdict
    if one.guard and one.refused:
        return f"failed: {', '.join(one.guard['failed'])}", "bad"
    if len(found.runs) == 1:
        return "", ""
    if verdict.tied and one.name in (verdict.run, *verdict.tied):
        return "equal", "unsure"
    if one.name == verdict.run:
        sound = verdict.word == "best" and not one.verdict["doubts"]
        return ("best" if verdict.word == "best" else "ahead"), ("good" if sound else "unsure")
    return ("can't tell", "unsure") if one.name in verdict.rivals else ("worse", "bad")


def against(difference: Difference, metric: str) -> View:
    """The difference to the best run as text, with its interval and what stands behind it."""
    ends = [change(end, metric, unit=False) for end in difference.ci95] if difference.ci95 else None
    how = "paired by row" if difference.paired else "not paired"
    p = f"; p {number(difference.p)}, corrected {number(difference.p_corrected)}" if ends else ""
    return {"text": change(difference.value, metric), "ci": ends, "value": difference.value, "how": how + p}


def findings(one: RankedRun) -> Findings:
    """What the doctor found in a run."""
    names = [finding["name"] for finding in one.findings]
    order = ("note", "warning", "stop")
    worst = max((order.index(finding["severity"]) for finding in one.findings), default=-1)
    return Findings(len(names), ", ".join(names), ("", "", "unsure", "bad")[worst + 1])


def curves(runs: Sequence[RankedRun]) -> list[View]:
    """Training and held-out loss of all runs, each as {title, note, plot}."""
    drawn = []
    for key, title, note in (
        ("loss", "Training loss", f"median over a {SMOOTHED}th of the steps"),
        ("eval_loss", "Held-out loss", "at each evaluation while training"),
    ):
        series = [
            plots.RunCurve(one.name, kind(place), place, smooth(one.curves[key]) if key == "loss" else one.curves[key])
            for place, one in enumerate(runs)
        ]
        plot = plots.overlay(series, "step", number, f"{title} of every run by training step", dots=key != "loss")
        if plot:
            drawn.append({"title": title, "note": f"nats per labelled token, {note}", "plot": plot})
    return drawn


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Medians over stretches of a 60th of the points, each at its stretch's last x; short curves stay as they are."""
    width = len(points) // SMOOTHED | 1  # odd: the median is then one of the values
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    return [(stretch[-1][0], sorted(y for _, y in stretch)[len(stretch) // 2]) for stretch in stretches]


def parallel(found: Comparison) -> View | None:
    """Settings and score of every run as lines, where at least two settings differ: {plot, left_out}."""
    runs, keys, metric = found.runs, found.differing.set, found.metric
    if len(keys) < 2:
        return None
    drawn, score = keys[:MAX_AXES], SCORES[metric]
    axes = [plots.Axis(short_name(key), [run.setting(key) for run in runs]) for key in drawn]
    scale = 100 if score.is_share else 1
    name = score.label + (", %" if score.is_share else "")
    axes.append(plots.Axis(name, [scale * run.score["value"] for run in runs], flip=score.better == "lower"))
    lines = [
        plots.RunLine(
            run.name,
            kind(place),
            place,
            f"{score.label} {write_score(metric, run.score['value'])}; "
            + ", ".join(f"{short_name(key)} {_short(run.setting(key), 30)}" for key in drawn),
        )
        for place, run in enumerate(runs)
    ]
    label = f"Parallel coordinates of {', '.join(drawn)} and {score.label}"
    return {"plot": plots.parallel(axes, lines, label), "left_out": keys[MAX_AXES:]}


def cost_plot(found: Comparison) -> View | None:
    """Score against price, where all runs have one in the same currency, else against time: {plot}."""
    runs, metric = found.runs, found.metric
    if len(runs) < 2:
        return None
    currencies = {run.cost.currency for run in runs}
    priced = len(currencies) == 1 and all(run.cost.price is not None for run in runs)
    most = max(run.cost.seconds for run in runs)
    unit, per = ("hours", 3600) if most >= 7200 else ("minutes", 60) if most >= 120 else ("seconds", 1)
    points = [
        plots.RunPoint(
            run.name,
            kind(place),
            place,
            x=run.cost.price if priced and run.cost.price is not None else run.cost.seconds / per,
            y=run.score["value"],
            ci95=run.score["ci95"],
            title=f"{SCORES[metric].label} {write_score(metric, run.score['value'])}, {spent(run.cost)}",
        )
        for place, run in enumerate(runs)
    ]
    x_name = f"price, {currencies.pop()}" if priced else f"time of all stages, {unit}"
    label = f"{SCORES[metric].label} of every run against its cost"
    # The axis needs no more digits than its ticks have.
    axis: Callable[[float], str] = partial(percent, digits=0) if SCORES[metric].is_share else number
    return {"plot": plots.scatter(points, x_name, axis, label, SCORES[metric].better == "lower")}


def chosen(found: Comparison) -> View | None:
    """What stages chose differently although nobody set it: {keys, rows: [(name, values)]}."""
    keys = found.differing.chosen
    if not keys:
        return None
    return {"keys": keys, "rows": [(run.name, [_setting(run, key) for key in keys]) for run in found.runs]}


def table(found: Comparison) -> str:
    """The comparison as CSV, a row a run: full precision, an empty cell where there is nothing to say."""
    runs, keys = found.runs, [*found.differing.set, *found.differing.chosen]
    metrics = [metric for metric in SCORES if any(metric in run.scores for run in runs)]
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    made = [
        _compared(found, one)
        | {name: value for metric in metrics for name, value in _score_columns(one.scores.get(metric), metric)}
        | {f"task {task}": one.tasks[task].value if task in one.tasks else None for task in tasks}
        | {"seconds": one.cost.seconds, "price": one.cost.price, "currency": one.cost.currency}
        | {"steps": one.steps, "doctor": findings(one).names}
        | {key: None if (value := one.setting(key)) is None else setting(value) for key in keys}
        for one in runs
    ]
    # As objects: a column of whole numbers with an empty cell stays one of whole numbers.
    return pd.DataFrame(made, dtype=object).to_csv(index=False, lineterminator="\n")


def _compared(found: Comparison, one: RankedRun) -> dict[str, Any]:
    """A run's columns about its place among the others."""
    difference = one.against_best
    low, high = (difference and difference.ci95) or (None, None)
    return {
        "rank": one.rank,
        "run": one.name,
        "status": status(found, one)[0],
        "judged_by": found.metric,
        "against_base": one.verdict["verdict"],
        "against_base_by": one.verdict["metric"],
        "difference_to_best": difference and difference.value,
        "difference_low": low,
        "difference_high": high,
        "p": difference and difference.p,
        "p_corrected": difference and difference.p_corrected,
        "paired": difference and difference.paired,
    }


def _score_columns(score: RunScore | None, metric: str) -> list[tuple[str, float | None]]:
    low, high = (score and score["ci95"]) or (None, None)
    return [
        (metric, score and score["value"]),
        (f"{metric}_n", score and score["n"]),
        (f"{metric}_low", low),
        (f"{metric}_high", high),
    ]


def spoken(key: str) -> str:
    """A setting's name as people count: train.learning_rate, or "data.sources 2 path" of what is one of many."""
    found = re.fullmatch(r"(.*?)\.(\d+)(?:\.(.*))?", key)
    return key if found is None else f"{found[1]} {int(found[2]) + 1} {found[3] or ''}".strip()


def short_name(key: str) -> str:
    """The same where its section needn't be told: learning_rate, "sources 2 path"."""
    first, *others = spoken(key).split(" ", 1)
    return " ".join([first.rpartition(".")[2], *others])


def kind(place: int) -> str:
    """The class of a run's colour by its place, 0 for the best."""
    return f"r{place}" if place < COLOURS else "rest"


def _score(score: RunScore | None, metric: str) -> Cell:
    if score is None:
        return Cell("–", None, "")
    ends = " to ".join(write_score(metric, end) for end in score["ci95"] or [])
    return Cell(write_score(metric, score["value"]), score["value"], f"95 % interval {ends}" if ends else "")


def _task(score: TaskScore | None) -> Cell:
    return Cell("–", None, "") if score is None else Cell(number(score.value), score.value, score.metric)


def _setting(one: RankedRun, key: str) -> SettingCell:
    """A setting's value for a cell, and how it sorts."""
    found = one.settings.get(key)
    if found is None:
        return SettingCell("–", None, "")
    value = found["value"]
    sort = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    whole = in_words(value)
    text = _short(value, WORDS)
    return SettingCell(text, sort, found["from"] if text == whole else f"{whole} ({found['from']})")


def _short(value: Any, most: int) -> str:
    text = in_words(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
