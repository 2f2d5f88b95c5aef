"""The report of one run: one page, the data's card, the same figures as JSON, and every setting with its origin.

`report_data` reads the stages and makes the figures; this module and `report_dataset` turn them into what the page's
template shows, `report_card` into the card.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import yaml

from adder import plots
from adder import report_data as data
from adder.files import write_json
from adder.progress import Progress
from adder.report_card import dataset_card
from adder.report_dataset import data_section, token_examples
from adder.report_samples import select_samples
from adder.report_text import FILTERS, HEADINGS, duration, heading, number, percent, size
from adder.report_training import doctor_section, epochs, filmstrip, preflight_section, training_section

TEMPLATES = Path(__file__).resolve().parent / "templates"
SHOWN_SAMPLES = 60


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write `report.html`, `card.md`, `metrics.json` and `run.yaml` into `out`; return the verdict.

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
    (out / "card.md").write_text(dataset_card(data.title(settings), facts), encoding="utf-8")
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
        "evaluated": len(facts["samples"]),
        "samples": select_samples(facts["samples"], SHOWN_SAMPLES),
        "doctor": doctor_section(settings, facts),
        "training": training_section(settings, facts),
        "filmstrip": filmstrip(facts),
        "preflight": preflight_section(facts),
        "data": data_section(facts),
        "lengths": lengths_section(facts, chosen),
        "examples": token_examples(facts["tokenize"]),
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
        ("Method", f"{values.get('train.method', trained)}, {epochs(train)}"),
        ("Data", f"{card['train']:,} training and {card['heldout']:,} held-out conversations"),
    ]


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


def lengths_section(facts: dict, chosen: list[dict]) -> dict:
    """The length decision: histogram with the chosen length, what each candidate would cost, the sentences."""
    lengths = facts["lengths"]
    choice, packing = lengths["max_seq_length"], lengths["packing"]
    histogram, cut = lengths["histogram"], lengths["truncation"]
    label = f"Histogram of example lengths in tokens with max_seq_length {choice['value']}"
    packed = lengths.get("examples_per_pack") if packing["value"] else None
    spread = f"{number(packed)} examples a pack" if packed else "one example a sequence"
    figures = [
        ("max_seq_length", f"{choice['value']:,}", "tokens"),
        ("packing", "on" if packing["value"] else "off", spread),
        ("Sequences", f"{lengths['packs']:,}", f"from {lengths['examples']:,} examples"),
        ("Fill", percent(lengths.get("fill")), "of the positions hold a token"),
        ("Truncation", cut["mode"], f"costs {percent(cut['share'], 2)} of the loss-bearing tokens"),
    ]
    return {
        "figures": figures,
        "tokens": lengths.get("tokens") or {},
        "plot": plots.histogram(
            histogram["edges"],
            histogram["counts"],
            choice["value"],
            label,
            "tokens",
            [row["max_seq_length"] for row in choice["alternatives"]],
        ),
        "truncation": cut,
        "choice": choice,
        "packing": packing,
        "table": table(choice["alternatives"], "max_seq_length", choice["value"]),
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
