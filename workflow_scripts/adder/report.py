"""The report of one run: one self-contained page, the same figures as JSON, and every setting with its origin as YAML.

`report_data` reads the stages and makes the figures; this module turns them into what the page's template shows.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from adder import plots
from adder import report_data as data
from adder.files import write_json
from adder.progress import Progress
from adder.report_samples import select_samples
from adder.report_text import FILTERS, HEADINGS, duration, heading, number, percent, size

TEMPLATES = Path(__file__).resolve().parent / "templates"
SHOWN_SAMPLES = 60


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write `report.html`, `metrics.json` and `run.yaml` into `out`; return the verdict.

    `settings`: {run, title or None, resolved: [{key, value, origin}], stages: {name: key}}. `inputs`: the finished
    folders of data, model, format, tokenize, lengths, train, merge, evaluate_base and evaluate_tuned.
    Raises UserError where a folder is incomplete or base and tuned were evaluated on different rows.
    """
    progress.line("reading the stages")
    facts = data.load(inputs)
    metrics = data.build_metrics(settings, facts)
    record = data.build_run(settings, facts, metrics)
    write_json(out / "metrics.json", metrics)
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)
    (out / "run.yaml").write_text(text, encoding="utf-8")
    page = render(build_view(settings, facts, metrics))
    (out / "report.html").write_text(page, encoding="utf-8")
    progress.say(metrics["verdict"]["sentence"])
    return metrics["verdict"]


def render(view: dict) -> str:
    """Fill the page's template; everything in `view` but the plots is escaped there."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(FILTERS)
    # The page may run this one script and nothing else: text that slipped through unescaped would still do no harm.
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        view, style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")), script=Markup(script), digest=digest
    )


def build_view(settings: dict, facts: dict, metrics: dict) -> dict:
    """Return everything that the template shows, by section."""
    chosen = data.choices(facts)
    given = {row["key"] for row in settings["resolved"] if row["value"] != "auto"}
    return {
        "title": data.title(settings),
        "run": settings["run"],
        "verdict": metrics["verdict"],
        "about": about(settings, facts),
        "cards": cards(metrics["heldout"], metrics["verdict"]),
        "samples": select_samples(facts["samples"], SHOWN_SAMPLES),
        "training": training(facts),
        "data": data_section(facts),
        "lengths": lengths_section(facts, chosen),
        "example": example(facts["tokenize"]),
        "tokenize": facts["tokenize"],
        "merge": merge_section(facts["merge"]),
        "fields": fields_section(metrics["fields"]),
        "choices": [
            choice | {"table": table(choice["alternatives"])} for choice in chosen if choice["key"] not in given
        ],
        "settings": data.resolve(settings, facts),
        "origins": ["chosen", "run", "config", "default"],
        "provenance": provenance(settings, facts),
    }


def about(settings: dict, facts: dict) -> list[tuple[str, str]]:
    """The line under the title: what was tuned, on what, how."""
    model, card, train = facts["model"], facts["format"], facts["train"]
    values = {row["key"]: row["value"] for row in settings["resolved"]}
    trained = "every weight" if train.get("trainable_parameters") == train.get("total_parameters") else "adapters"
    return [
        ("Base", str(model["source"])),
        ("Method", f"{values.get('train.method', trained)}, {_epochs(train)}"),
        ("Data", f"{card['train']:,} training and {card['heldout']:,} held-out conversations"),
    ]


def _epochs(train: dict) -> str:
    return f"{number(train['epochs'])} {'epoch' if train['epochs'] == 1 else 'epochs'}"


def cards(heldout: dict, verdict: dict) -> list[dict]:
    """One card a score: base, tuned, their difference and both intervals on one scale."""
    made = []
    for key, entry in heldout.items():
        about_metric = data.METRICS[key]
        share = about_metric["kind"] == "share"
        show = percent if share else number
        scores = [entry[who] for who in ("base", "tuned")]
        ends = [end for s in scores if s for end in (s["value"], *(s["ci95"] or [])) if end is not None]
        difference = entry["difference"] or {}
        value = difference.get("value")
        better = (value or 0) > 0 if about_metric["better"] == "higher" else (value or 0) < 0
        label = f"{about_metric['name']}: base and tuned with their 95 % confidence intervals"
        axis = (lambda x: f"{x * 100:.0f} %") if share else number
        made.append({
            "key": key,
            "name": about_metric["name"],
            "note": about_metric.get("unit", ""),
            "better": about_metric["better"],
            "main": key == verdict["metric"],
            "base": scores[0] and show(scores[0]["value"]),
            "tuned": scores[1] and show(scores[1]["value"]),
            "n": next((s["n"] for s in reversed(scores) if s), None),
            "difference": value is not None and change(value, share),
            "ci": difference.get("ci95") and [change(end, share, unit=False) for end in difference["ci95"]],
            "tone": ("good" if better else "bad") if is_sure(difference) else "",
            "plot": plots.interval(*scores, 1.0 if share else plots.ceiling(max(ends, default=1.0)), axis, label),
        })  # fmt: skip
    return made


def is_sure(difference: dict) -> bool:
    """Whether a difference is more than chance, as `statistics.verdict` has it: only then it gets a colour."""
    low, high = difference.get("ci95") or (None, None)
    apart = low is not None and high is not None and (low > 0 or high < 0)
    return apart and (difference.get("p") is None or difference["p"] < 0.05)


def change(value: float | None, share: bool, unit: bool = True) -> str:
    """A signed difference; of shares in percentage points."""
    if value is None:
        return "–"
    text = f"{value * 100:+.1f}" if share else ("+" if value > 0 else "") + number(value)
    return text.replace("-", "−") + (" points" if share and unit else "")


def training(facts: dict) -> dict:
    """Curves and key figures of the training."""
    train, curve = facts["train"], facts["curve"]

    def points(name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in curve if line.get(name) is not None]

    batch = train.get("effective_batch") or {}
    share = train["trainable_parameters"] / train["total_parameters"] if train.get("total_parameters") else None
    tokens = train.get("tokens_per_epoch")
    seconds = train.get("seconds") or facts["records"]["train"].get("seconds")
    figures = [
        ("Steps", f"{train['steps']:,}", _epochs(train)),
        ("Time", duration(seconds), f"{number(train.get('tokens_per_second'))} tokens/s"),
        ("Tokens", f"{tokens:,}" if tokens else "–", "an epoch"),
        ("Loss", f"{number(train.get('first_loss'))} → {number(train.get('final_loss'))}", "first step and last ten"),
        ("Trained parameters", f"{train['trainable_parameters']:,}", f"{percent(share)} of the model"),
        (
            "Effective batch",
            number(batch.get("mean_examples")),
            f"examples a step, asked: {batch.get('asked', '–')}",
        ),
    ]
    losses = [{"name": "loss", "kind": "tuned", "points": points("loss")}]
    evaluated = points("eval_loss")
    if evaluated:
        losses.append({"name": "held-out loss", "kind": "heldout", "points": evaluated, "dots": True})
    wanted = [("Loss", "nats per labelled token", losses, number, True)]
    for name, label, unit in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Throughput", "tokens per second"),
    ):
        series = [{"name": label.lower(), "kind": "plain", "points": points(name)}]
        wanted.append((label, unit, series, number, True))
    drawn = [
        {
            "title": label,
            "unit": unit,
            "plot": plots.lines(series, "step", show, f"{label} by training step", zero),
            "legend": [(one["name"], one["kind"]) for one in series] if len(series) > 1 else [],
        }
        for label, unit, series, show, zero in wanted
    ]
    return {"figures": figures, "curves": [one for one in drawn if one["plot"]], "resumed": train.get("resumed_from")}


def data_section(facts: dict) -> dict:
    """Where the rows went and why."""
    card = facts["format"]
    parts = [
        {"name": "training", "count": card["train"], "kind": "tuned"},
        {"name": "held out", "count": card["heldout"], "kind": "heldout"},
        {"name": "duplicates", "count": card["duplicates"], "kind": "plain"},
        {"name": "leaked", "count": card["leaked"], "kind": "plain"},
        {"name": "rejected", "count": card["rejected"], "kind": "past"},
    ]
    too_long = len(facts["lengths"].get("dropped") or [])
    reasons = [(reason, count) for reason, count in (card.get("rejects_by_reason") or {}).items()]
    return {
        "plot": plots.flow(card["rows_in"], parts, "Rows in, and what became of them"),
        "card": card,
        "reasons": sorted(reasons, key=lambda pair: (-pair[1], pair[0])),
        "rejects": [row | {"data": json.dumps(row.get("data"), ensure_ascii=False)} for row in facts["rejects"]],
        "too_long": too_long,
        "untokenized": facts["tokenize"].get("rejected") or [],
        "counts": facts["tokenize"].get("counts") or {},
    }


def lengths_section(facts: dict, chosen: list[dict]) -> dict:
    """The length decision: histogram with the chosen length, what each candidate would cost, the sentences."""
    lengths = facts["lengths"]
    choice, packing = lengths["max_seq_length"], lengths["packing"]
    histogram = lengths.get("histogram") or {"edges": [], "counts": []}
    label = f"Histogram of example lengths in tokens with max_seq_length {choice['value']}"
    packed = lengths.get("examples_per_pack") if packing["value"] else None
    spread = f"{number(packed)} examples a pack" if packed else "one example a sequence"
    figures = [
        ("max_seq_length", f"{choice['value']:,}", "tokens"),
        ("packing", "on" if packing["value"] else "off", spread),
        ("Sequences", f"{lengths['packs']:,}", f"from {lengths['examples']:,} examples"),
        ("Fill", percent(lengths.get("fill")), "of the positions hold a token"),
    ]
    alternatives = choice.get("alternatives") or packing.get("alternatives") or []
    return {
        "figures": figures,
        "tokens": lengths.get("tokens") or {},
        "plot": plots.histogram(histogram["edges"], histogram["counts"], choice["value"], label, "tokens"),
        "choice": choice,
        "packing": packing,
        "table": table(alternatives, "max_seq_length", choice["value"]),
    }


def table(alternatives: list[dict], key: str | None = None, value: Any = None) -> dict | None:
    """Rows and columns of a choice's alternatives; the row whose `key` is `value` is the chosen one."""
    if not alternatives:
        return None
    found = list(dict.fromkeys(name for row in alternatives for name in row))
    # Files have their keys sorted; people read a candidate's name first, then what it would cost.
    columns = [name for name in HEADINGS if name in found] + [name for name in found if name not in HEADINGS]
    rows = [
        {"chosen": key is not None and row.get(key) == value, "cells": [(name, row.get(name)) for name in columns]}
        for row in alternatives
    ]
    return {"columns": [heading(name) for name in columns], "rows": rows}


def example(tokenize: dict) -> list[tuple[str, int]]:
    """One example's tokens, each with whether it carries loss."""
    shown = tokenize.get("example") or {"tokens": [], "loss": []}
    return [(text, loss) for text, loss in zip(shown["tokens"], shown["loss"], strict=True)]


def merge_section(proof: dict) -> dict:
    """What was checked of the merged weights, as rows of (what, value, note)."""
    known = [
        ("max_difference", "Largest logit difference", number),
        ("mean_difference", "Mean logit difference", number),
        ("kl", "KL divergence", lambda value: f"{number(value)} nats per token"),
        ("tolerance", "Tolerance", number),
        ("top_token_agreement", "Same most likely token", lambda value: percent(value, 2)),
        ("positions", "Positions compared", lambda value: f"{value:,}"),
        ("adapted_weights", "Weights with an adapter", lambda value: f"{value:,}"),
        ("changed_weights", "Weights changed by merging", lambda value: f"{value:,}"),
        ("unchanged_weights", "Weights left as they were", lambda value: f"{value:,}"),
    ]
    rows = [(label, show(proof[name])) for name, label, show in known if proof.get(name) is not None]
    return {"rows": rows, "reason": proof.get("reason", ""), "checked": proof.get("checked", False)}


def fields_section(fields: dict) -> list[dict]:
    """One row a field: scores of base and tuned, and both F1 on one line."""
    rows = []
    for name, scores in fields.items():
        f1 = [scores[who] and scores[who].get("f1") for who in ("base", "tuned")]
        label = f"F1 of base {percent(f1[0])} and tuned {percent(f1[1])}"
        rows.append({"name": name, **scores, "plot": plots.pair(*f1, label)})
    return rows


def provenance(settings: dict, facts: dict) -> dict:
    """Where everything came from and what it cost."""
    records = facts["records"]
    stages = [
        {
            "name": stage,
            "key": settings["stages"].get(stage, record.get("key", "")),
            "path": facts["paths"][stage],
            "seconds": record.get("seconds"),
            "memory": record.get("peak_memory_bytes"),
            "gpu_memory": record.get("peak_gpu_memory_bytes"),
            "restored": bool(record.get("restored")),
            "finished_at": record.get("finished_at", ""),
        }
        for stage, record in records.items()
    ]
    timed = [
        {"name": s["name"], "value": s["seconds"], "kind": "tuned" if s["name"] == "train" else "plain", "note": ""}
        for s in stages
        if s["seconds"] is not None
    ]
    machines = dict.fromkeys(machine(record.get("hardware") or {}) for record in records.values())
    generation = {who: facts[f"evaluate_{who}"].get("generation") or {} for who in ("base", "tuned")}
    return {
        "model": facts["model"],
        "sources": facts["data"],
        "stages": stages,
        "total": sum(row["value"] for row in timed),
        "plot": plots.bars(timed, duration, "Seconds a stage took"),
        "machines": [text for text in machines if text],
        "versions": data.versions(facts) | {"lm-eval": facts["evaluate_tuned"].get("lm_eval_version", "–")},
        "generation": generation,
        "any_restored": any(s["restored"] for s in stages),
        "any_gpu": any(s["gpu_memory"] for s in stages),
    }


def machine(hardware: dict) -> str:
    """One line on the machine that a stage ran on."""
    parts = [hardware.get("cpu"), hardware.get("cores") and f"{hardware['cores']} cores"]
    parts.append(hardware.get("memory_bytes") and f"{size(hardware['memory_bytes'])} memory")
    gpu = hardware.get("gpu")
    parts.append(str(gpu.get("name", gpu)) if isinstance(gpu, dict) else gpu)
    return ", ".join(str(part) for part in parts if part)
