"""The report of one run: one page, the cards of data and model, the same figures as JSON, every setting's origin.

`report_data` and `report_scores` read the stages and make the figures; this module and one for each part of the page
(`report_dataset`, `report_training`, `report_merge`, `report_evaluation`, `report_samples`, `report_provenance`) turn
them into what its template shows, `report_card` and `model_card` into the cards.
"""

from pathlib import Path
from typing import Any

import yaml

from adder.core.files import write_json
from adder.core.progress import Progress
from adder.report import facts as data
from adder.report import plots
from adder.report.data_card import dataset_card
from adder.report.data_section import data_section, token_examples
from adder.report.evaluation_section import cards, evaluation_section
from adder.report.formatting import HEADINGS, heading, number, percent
from adder.report.html_page import render
from adder.report.merge_section import merge_section
from adder.report.model_card import model_card
from adder.report.provenance_section import provenance
from adder.report.samples_section import select_samples
from adder.report.summary_section import summary
from adder.report.training_section import doctor_section, epochs, filmstrip, preflight_section, training_section

SHOWN_SAMPLES = 60
# Choices whose alternatives stand in a section of their own.
TABLES_ELSEWHERE = ("lengths.max_seq_length", "train.frozen_products", "merge.base")


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write `report.html`, `card.md`, `model_card.md`, `metrics.json` and `run.yaml` into `out`; return the verdict.

    `settings`: {run, title or None, resolved: [{key, value, origin}], stages: {name: key}, tasks: [names],
    price_per_hour or None, currency}. `inputs`: the finished folders of data, model, format, tokenize, lengths, train,
    merge, evaluate_base and evaluate_tuned, of `task_base_0`, `task_tuned_0` and so on for each task, and of `judge`
    where there is one.
    Raises UserError where a folder is incomplete or base and tuned were evaluated on different rows.
    """
    progress.line("reading the stages")
    facts = data.load(inputs)
    metrics = data.build_metrics(settings, facts)
    record = data.build_run(settings, facts, metrics)
    write_json(out / "metrics.json", metrics)
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)
    (out / "run.yaml").write_text(text, encoding="utf-8")
    page = render("report", build_view(settings, facts, metrics), ("report.css",))
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "card.md").write_text(dataset_card(data.title(settings), facts), encoding="utf-8")
    (out / "model_card.md").write_text(model_card(settings, facts, metrics), encoding="utf-8")
    progress.say(metrics["verdict"]["sentence"])
    return metrics["verdict"]


def build_view(settings: dict, facts: dict, metrics: dict) -> dict:
    """Return everything that the template shows, by section."""
    chosen = data.choices(facts)
    given = {row["key"] for row in settings["resolved"] if row["value"] != "auto"}
    return {
        "title": data.title(settings),
        "run": settings["run"],
        "verdict": metrics["verdict"],
        "tone": tone(metrics),
        "about": about(settings, facts),
        "cards": cards(metrics["heldout"], metrics["verdict"]),
        "summary": summary(facts, metrics),
        "evaluation": evaluation_section(facts, metrics),
        "samples": select_samples(facts["samples"], SHOWN_SAMPLES),
        "doctor": doctor_section(settings, facts),
        "training": training_section(settings, facts),
        "filmstrip": filmstrip(facts),
        "preflight": preflight_section(facts),
        "products": products_section(facts),
        "data": data_section(facts),
        "lengths": lengths_section(facts, chosen),
        "examples": token_examples(facts["tokenize"]),
        "tokenize": facts["tokenize"],
        "merge": merge_section(facts["merge"]),
        "choices": [
            choice | {"table": None if choice["key"] in TABLES_ELSEWHERE else table(choice["alternatives"])}
            for choice in chosen
            if choice["key"] not in given
        ],
        "settings": data.resolve(settings, facts),
        "origins": ["chosen", "run", "config", "default"],
        "provenance": provenance(settings, facts, metrics),
    }


def tone(metrics: dict) -> str:
    """The verdict's colour: "better", "worse", or "unsure", which a better model is that fails its guard."""
    found = metrics["verdict"]["verdict"]
    if found == "better" and metrics["guard"] and not metrics["guard"]["passed"]:
        return "unsure"
    return found if found in ("better", "worse") else "unsure"


def about(settings: dict, facts: dict) -> list[tuple[str, str]]:
    """The line under the title: what was tuned, on what, how."""
    model, card, train = facts["model"], facts["format"], facts["train"]
    values = {row["key"]: row["value"] for row in settings["resolved"]}
    trained = "every weight" if train.get("trainable_parameters") == train.get("total_parameters") else "adapters"
    return [
        ("Base", str(model["source"])),
        ("Method", f"{values.get('train.method', trained)}, {epochs(train)}"),
        ("Data", f"{trained_on(facts)} training and {card['heldout']:,} held-out conversations"),
    ]


def trained_on(facts: dict) -> str:
    """How many conversations were trained on; of how many, where train.max_examples or their length left some out."""
    card, lengths = facts["format"], facts["lengths"]
    used = lengths["tokens"]["count"] - lengths["dropped"]
    return f"{card['train']:,}" if used == card["train_rows"] else f"{used:,} of {card['train_rows']:,}"


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


def products_section(facts: dict) -> dict | None:
    """How fp8 compared with bf16 before training, taken, left or set: the sentence and the figures."""
    choice = facts["plan"].get("frozen_products")
    if not choice or not choice["alternatives"]:
        return None
    return {"reason": choice["reason"], "table": table(choice["alternatives"], "products", choice["value"])}


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
