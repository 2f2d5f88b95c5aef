"""The report of one run: one page, the cards of data and model, the same figures as JSON, every setting's origin.

`facts` reads the stages; `scores`, `run_metrics` and `resolved_settings` make the figures; a module of `sections` for
each section of the page turns them into what its template shows, `data_card` and `model_card` into the cards.
"""

from pathlib import Path

import yaml

from adder.core.files import write_json
from adder.core.stage_spec import Context
from adder.report import facts as run_facts
from adder.report import resolved_settings
from adder.report.data_card import dataset_card
from adder.report.facts import RunFacts
from adder.report.html_page import render
from adder.report.model_card import came_as, model_card
from adder.report.page_section import PageSection, RunReport, View
from adder.report.run_metrics import build_metrics
from adder.report.scores import RunVerdict
from adder.report.sections import (
    choices_section,
    data_section,
    doctor_section,
    evaluation_section,
    filmstrip_section,
    lengths_section,
    merge_section,
    other_section,
    provenance_section,
    samples_section,
    settings_section,
    tokens_section,
    training_section,
    verdict_section,
)
from adder.report.sections.training_section import epochs
from adder.report.stage import ReportSettings

# In the order of the page, which is that in which a run is made.
SECTIONS: tuple[PageSection, ...] = (
    verdict_section.SECTION,
    doctor_section.SECTION,
    data_section.SECTION,
    tokens_section.SECTION,
    lengths_section.SECTION,
    training_section.SECTION,
    filmstrip_section.SECTION,
    merge_section.SECTION,
    evaluation_section.SECTION,
    samples_section.SECTION,
    other_section.SECTION,
    choices_section.SECTION,
    settings_section.SECTION,
    provenance_section.SECTION,
)


def run(settings: ReportSettings, inputs: dict[str, Path], out: Path, context: Context) -> RunVerdict:
    """Write `report.html`, `card.md`, `model_card.md`, `metrics.json` and `run.yaml` into `out`; return the verdict.

    `inputs`: the finished folders of the run's stages, as `facts.load` wants them.
    Raises UserError where a folder is incomplete or base and tuned were evaluated on different rows.
    """
    context.progress.line("reading the stages")
    facts = run_facts.load(inputs, settings.shows)
    metrics = build_metrics(settings, facts)
    verdict = metrics["verdict"]
    write_json(out / "metrics.json", metrics)
    record = resolved_settings.build_run_yaml(settings, facts, verdict["sentence"])
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)
    (out / "run.yaml").write_text(text, encoding="utf-8")
    page = render("report", build_view(RunReport(settings, facts, metrics)), ("report.css",))
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "card.md").write_text(dataset_card(resolved_settings.title(settings), facts), encoding="utf-8")
    (out / "model_card.md").write_text(model_card(settings, facts, metrics), encoding="utf-8")
    context.progress.say(verdict["sentence"])
    return verdict


def build_view(report: RunReport) -> View:
    """Return what the page shows: what stands above the sections, and each section's view under its name."""
    views = {section: section.view(report) for section in SECTIONS}
    return {
        "title": resolved_settings.title(report.settings),
        "run": report.settings.run,
        "about": about(report.settings, report.facts),
        "sections": [section for section, view in views.items() if view],
        **{section.name: view for section, view in views.items() if view},
    }


def about(settings: ReportSettings, facts: RunFacts) -> list[tuple[str, str]]:
    """The line under the title: what was tuned, on what, how."""
    train = facts.train
    values = {row.key: row.value for row in settings.resolved}
    trained = "every weight" if train.get("trainable_parameters") == train.get("total_parameters") else "adapters"
    heldout = f"{facts.format['heldout']:,} held-out conversations"
    came, earlier = came_as(facts.model), facts.model.get("adapter")
    begun = f", going on from {earlier['source']}" if earlier else ""
    return [
        ("Base", f"{facts.model['source']}, which came as {came}" if came else str(facts.model["source"])),
        ("Method", f"{values.get('train.method', trained)}, {epochs(train)}{begun}"),
        ("Data", f"{trained_on(facts)} training and {heldout}"),
    ]


def trained_on(facts: RunFacts) -> str:
    """How many conversations were trained on; of how many, where train.max_examples or their length left some out."""
    card, lengths = facts.format, facts.lengths
    used = lengths["tokens"]["count"] - lengths["dropped"]
    return f"{card['train']:,}" if used == card["train_rows"] else f"{used:,} of {card['train_rows']:,}"
