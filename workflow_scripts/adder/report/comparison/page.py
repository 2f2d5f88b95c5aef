"""All runs of a configuration on one page and in one table: which to use, how sure that is, and what it cost.

`compare_data` reads the runs and compares them, `compare_text` has the words, `compare_plots` the plots; this module
makes `compare.html` and `compare.csv` of them.
"""

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adder.evaluation.metrics import SCORES
from adder.report.comparison import facts as data
from adder.report.comparison import plots
from adder.report.comparison.sentences import advice, change, lower, money, sentence, shower, spent
from adder.report.formatting import clip, number, percent, setting
from adder.report.html_page import render

COLOURS = 8  # runs that have a colour of their own; further ones are grey
MAX_AXES = 8  # settings that parallel coordinates show
SMOOTHED = 60  # a training curve is shown as medians over a 60th of its steps: single steps of many runs are a thicket
WORDS = 60  # characters of a setting's value in a table


def run(runs: dict[str, dict[str, Path]], out: Path) -> dict:
    """Write `compare.html` and `compare.csv` into `out`; return the verdict with its `sentence`.

    `runs`: for each run the finished folders of its stages, under the names by which the report knows them, and that
    of `report` itself. Raises UserError where a folder is incomplete or the runs have no score in common.
    """
    found = data.compare(runs)
    page, rows = render("compare", build_view(found), ("report.css", "compare.css")), table(found)
    (out / "compare.html").write_text(page, encoding="utf-8")
    (out / "compare.csv").write_text(rows, encoding="utf-8")
    return found["verdict"] | {"sentence": sentence(found)}


def build_view(found: dict) -> dict:
    """Return everything that the template shows, by section."""
    runs, metric = found["runs"], SCORES[found["metric"]]
    best = runs[0]
    several = len(runs) > 1
    return {
        "title": f"{len(runs)} runs compared" if several else f"One run: {best['name']}",
        "about": about(found),
        "tone": tone(found),
        "sentence": sentence(found),
        "advice": advice(found),
        "several": several,
        "metric": {"name": metric.label, "better": metric.better},
        "paired": found["paired"],
        "legend": [{"run": place, "kind": kind(place), "name": run["name"]} for place, run in enumerate(runs)],
        "coloured": COLOURS,
        "table": rows(found),
        "curves": curves(runs),
        "parallel": parallel(found),
        "cost": cost_plot(found),
        "chosen": chosen(found),
    }


def about(found: dict) -> list[tuple[str, str]]:
    """The line under the title: what the runs are judged by and in what they differ."""
    metric, keys = SCORES[found["metric"]], found["differing"]["set"]
    held = f"the same {found['rows']:,}" if found["rows"] is not None else "not the same in all runs"
    named = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    return [
        ("Judged by", lower(metric.label) + (f", {metric.unit}" if metric.unit else "")),
        ("Held-out rows", held),
        ("Settings that differ", named or "none"),
    ]


def tone(found: dict) -> str:
    """The verdict's colour: where one model is surely the best, that of how it does against its base."""
    verdict = found["verdict"]
    if verdict["word"] == "refused":
        return "worse"
    best, others = found["runs"][0], found["runs"][1:]
    sure = verdict["same_model"] == verdict["rivals"] and all(run["against_best"]["paired"] for run in others)
    return best["verdict"]["verdict"] if sure else "unsure"


def rows(found: dict) -> dict:
    """The table of runs: {settings: [(key, short name)], scores and tasks: [names], axis: its ends, priced, rows}."""
    runs, main = found["runs"], found["metric"]
    others = [metric for metric in SCORES if metric != main and any(metric in run["scores"] for run in runs)]
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    keys = found["differing"]["set"]
    ends = [end for run in runs for end in (run["score"]["ci95"] or [run["score"]["value"]])]
    room = (max(ends) - min(ends)) * 0.05 or abs(ends[0]) * 0.1 or 1.0
    low, high = max(0.0, min(ends) - room) if min(ends) >= 0 else min(ends) - room, max(ends) + room
    if SCORES[main].is_share:
        high = min(1.0, high)
    show = shower(main)
    made = []
    for place, one in enumerate(runs):
        score, base = one["score"], (one["base"].get(main) or {}).get("value")
        interval = score["ci95"] and [show(end) for end in score["ci95"]]
        text = f"{one['name']}: {show(score['value'])}"
        text += f", 95 % interval {interval[0]} to {interval[1]}" if interval else ""
        text += f"; base {show(base)}" if base is not None else ""
        made.append({
            "run": place, "kind": kind(place), "name": one["name"], "link": f"./{quote(one['name'])}/report.html",
            "base_drawn": base is not None and low <= base <= high,
            "value": score["value"], "score": show(score["value"]), "interval": interval,
            "plot": plots.interval(score, base, low, high, text), "status": status(found, one),
            "against": one["against_best"] and against(one["against_best"], main),
            "scores": [_score(one["scores"].get(metric), metric) for metric in others],
            "tasks": [_task(one["tasks"].get(task)) for task in tasks],
            "settings": [_setting(one, key) for key in keys],
            "seconds": one["cost"]["seconds"], "price": money(one["cost"]), "price_value": one["cost"]["price"],
            "steps": one["steps"], "base": one["verdict"]["verdict"], "sentence": one["verdict"]["sentence"],
            "base_by": "" if one["verdict"]["metric"] == main else SCORES[one["verdict"]["metric"]].label.lower(),
            "findings": findings(one),
        })  # fmt: skip
    return {
        "settings": [(key, key.rpartition(".")[2]) for key in keys],
        "scores": [SCORES[metric].label for metric in others],
        "tasks": tasks,
        "axis": (show(low), show(high)),
        "priced": any(row["price"] for row in made),
        "rows": made,
    }


def status(found: dict, one: dict) -> tuple[str, str]:
    """What the table says of a run beside its score, and in which colour."""
    verdict = found["verdict"]
    if data.refused(one):
        return f"failed: {', '.join(one['guard']['failed'])}", "bad"
    if len(found["runs"]) == 1:
        return "", ""
    if verdict["tied"] and one["name"] in (verdict["run"], *verdict["tied"]):
        return "equal", "unsure"
    if one["name"] == verdict["run"]:
        return ("best", "good") if verdict["word"] == "best" else ("ahead", "unsure")
    return ("can't tell", "unsure") if one["name"] in verdict["rivals"] else ("worse", "bad")


def against(difference: dict, metric: str) -> dict:
    """The difference to the best run as text, with its interval and what stands behind it."""
    ends = difference["ci95"] and [change(end, metric, unit=False) for end in difference["ci95"]]
    how = "paired by row" if difference["paired"] else "not paired"
    p = f"; p {number(difference['p'])}, corrected {number(difference['p_corrected'])}" if ends else ""
    return {"text": change(difference["value"], metric), "ci": ends, "value": difference["value"], "how": how + p}


def findings(one: dict) -> dict:
    """What the doctor found in a run: how many, the worst's severity, their names."""
    names = [finding["name"] for finding in one["findings"]]
    order = ("note", "warning", "stop")
    worst = max((order.index(finding["severity"]) for finding in one["findings"]), default=-1)
    return {"count": len(names), "names": ", ".join(names), "tone": ("", "", "unsure", "bad")[worst + 1]}


def curves(runs: Sequence[dict]) -> list[dict]:
    """Training and held-out loss of all runs, each as {title, note, plot}."""
    drawn = []
    for key, title, note in (
        ("loss", "Training loss", f"median over a {SMOOTHED}th of the steps"),
        ("eval_loss", "Held-out loss", "at each evaluation while training"),
    ):
        series = [
            {"name": one["name"], "kind": kind(place), "run": place, "points": one["curves"][key]}
            for place, one in enumerate(runs)
        ]
        if key == "loss":
            series = [one | {"points": smooth(one["points"])} for one in series]
        plot = plots.overlay(series, "step", number, f"{title} of every run by training step", dots=key != "loss")
        if plot:
            drawn.append({"title": title, "note": f"nats per labelled token, {note}", "plot": plot})
    return drawn


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Medians over stretches of a 60th of the points, each at its stretch's last x; short curves stay as they are."""
    width = len(points) // SMOOTHED | 1  # odd: the median is then one of the values
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    return [(stretch[-1][0], sorted(y for _, y in stretch)[len(stretch) // 2]) for stretch in stretches]


def parallel(found: dict) -> dict | None:
    """Settings and score of every run as lines, where at least two settings differ: {plot, left_out}."""
    runs, keys, metric = found["runs"], found["differing"]["set"], found["metric"]
    if len(keys) < 2:
        return None
    axes = [
        {"name": key.rpartition(".")[2], "values": [data.value_of(run, key) for run in runs], "flip": False}
        for key in keys[:MAX_AXES]
    ]
    flip = SCORES[metric].better == "lower"
    scale = 100 if SCORES[metric].is_share else 1
    values = [scale * run["score"]["value"] for run in runs]
    axes.append({"name": SCORES[metric].label + (", %" if scale == 100 else ""), "values": values, "flip": flip})
    show = shower(metric)
    lines = [
        {
            "name": run["name"], "kind": kind(place), "run": place,
            "title": f"{SCORES[metric].label} {show(run['score']['value'])}; "
            + ", ".join(f"{key.rpartition('.')[2]} {_short(data.value_of(run, key), 30)}" for key in keys[:MAX_AXES]),
        }
        for place, run in enumerate(runs)
    ]  # fmt: skip
    label = f"Parallel coordinates of {', '.join(keys[:MAX_AXES])} and {SCORES[metric].label}"
    return {"plot": plots.parallel(axes, lines, label), "left_out": keys[MAX_AXES:]}


def cost_plot(found: dict) -> dict | None:
    """Score against price, where all runs have one in the same currency, else against time: {plot}."""
    runs, metric = found["runs"], found["metric"]
    if len(runs) < 2:
        return None
    currencies = {run["cost"]["currency"] for run in runs}
    priced = len(currencies) == 1 and all(run["cost"]["price"] is not None for run in runs)
    most = max(run["cost"]["seconds"] for run in runs)
    unit, per = ("hours", 3600) if most >= 7200 else ("minutes", 60) if most >= 120 else ("seconds", 1)
    show = shower(metric)
    points = [
        {
            "name": run["name"], "kind": kind(place), "run": place, "y": run["score"]["value"],
            "x": run["cost"]["price"] if priced else run["cost"]["seconds"] / per, "ci95": run["score"]["ci95"],
            "title": f"{SCORES[metric].label} {show(run['score']['value'])}, {spent(run['cost'])}",
        }
        for place, run in enumerate(runs)
    ]  # fmt: skip
    x_name = f"price, {currencies.pop()}" if priced else f"time of all stages, {unit}"
    label = f"{SCORES[metric].label} of every run against its cost"
    # The axis needs no more digits than its ticks have.
    axis = partial(percent, digits=0) if SCORES[metric].is_share else number
    return {"plot": plots.scatter(points, x_name, axis, label, SCORES[metric].better == "lower")}


def chosen(found: dict) -> dict | None:
    """What stages chose differently although nobody set it: {keys, rows: [(name, values)]}."""
    keys = found["differing"]["chosen"]
    if not keys:
        return None
    return {"keys": keys, "rows": [(run["name"], [_setting(run, key) for key in keys]) for run in found["runs"]]}


def table(found: dict) -> str:
    """The comparison as CSV, a row a run: full precision, an empty cell where there is nothing to say."""
    runs, main, keys = found["runs"], found["metric"], found["differing"]["set"] + found["differing"]["chosen"]
    metrics = [metric for metric in SCORES if any(metric in run["scores"] for run in runs)]
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    made = []
    for one in runs:
        difference = one["against_best"] or {}
        low, high = difference.get("ci95") or (None, None)
        row = {
            "rank": one["rank"], "run": one["name"], "status": status(found, one)[0], "judged_by": main,
            "against_base": one["verdict"]["verdict"], "against_base_by": one["verdict"]["metric"],
            "difference_to_best": difference.get("value"),
            "difference_low": low, "difference_high": high, "p": difference.get("p"),
            "p_corrected": difference.get("p_corrected"), "paired": difference.get("paired"),
        }  # fmt: skip
        for metric in metrics:
            score = one["scores"].get(metric) or {"value": None, "ci95": None, "n": None}
            row |= {metric: score["value"], f"{metric}_n": score["n"]}
            row |= dict(zip((f"{metric}_low", f"{metric}_high"), score["ci95"] or (None, None), strict=True))
        row |= {f"task {task}": (one["tasks"].get(task) or {}).get("value") for task in tasks}
        row |= {"seconds": one["cost"]["seconds"], "price": one["cost"]["price"], "currency": one["cost"]["currency"]}
        row |= {"steps": one["steps"], "doctor": findings(one)["names"]}
        values = {key: data.value_of(one, key) for key in keys}
        made.append(row | {key: value if value is None else setting(value) for key, value in values.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, made[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    return text.getvalue()


def kind(place: int) -> str:
    """The class of a run's colour by its place, 0 for the best."""
    return f"r{place}" if place < COLOURS else "rest"


def _score(score: dict | None, metric: str) -> dict:
    text = shower(metric)(score["value"]) if score else "–"
    ends = score and score["ci95"] and " to ".join(shower(metric)(end) for end in score["ci95"])
    return {"text": text, "value": score["value"] if score else None, "title": f"95 % interval {ends}" if ends else ""}


def _task(score: dict | None) -> dict:
    if score is None:
        return {"text": "–", "value": None, "title": ""}
    return {"text": number(score["value"]), "value": score["value"], "title": score["metric"]}


def _setting(one: dict, key: str) -> dict:
    """A setting's value for a cell, and how it sorts."""
    value = data.value_of(one, key)
    found = one["settings"].get(key)
    sort = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    return {"text": _short(value, WORDS) if found else "–", "value": sort, "from": found["from"] if found else ""}


def _short(value: Any, most: int) -> str:
    return clip(f"{value:.6g}" if isinstance(value, float) else setting(value), most)
