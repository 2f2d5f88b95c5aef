"""Replies while training: from the base to the reference, thinned where there are many."""

import re

from adder.core.files import read_jsonl, write_jsonl
from adder.report import html_page, run, run_metrics
from adder.report.facts import load
from adder.report.page_section import RunReport
from adder.report.sections import filmstrip_section
from page_parser import Page
from report_fixture import write_stage_folders
from report_pages import make, section


def test_the_filmstrip_shows_each_prompt_from_the_base_to_the_reference(tmp_path):
    out = make(tmp_path, course="overfitted", heldout=20)
    text, film = (out / "report.html").read_text(encoding="utf-8"), section(out, "filmstrip")
    frames = re.findall(r'<section class="frame([^"]*)">\s*<h4>(.*?)</h4>(.*?)</section>', text, re.S)
    heads = [" ".join("".join(Page(head).text).split()) for _, head, _ in frames[:6]]
    assert heads == [
        "Base ✗ differs", "Step 31 ✗ differs", "Step 62 ✓ matches kept", "Step 93 ✗ differs", "Step 122 ✗ differs",
        "Reference",
    ]  # fmt: skip
    assert len(frames) == 18 and [kind for kind, _, _ in frames[:3]] == ["", "", " kept"]
    assert "<mark>urgent</mark>" in frames[1][2] and "Cut off: it did not end by itself" in frames[0][2]
    assert "As before." in frames[8][2] and "<mark>" not in frames[8][2]
    assert "The same 3 held-out prompts" in film and "Step 93: differs" not in film
    assert text.count('class="frames" tabindex="0" role="region"') == 3


def test_long_filmstrips_are_thinned_but_keep_base_last_and_kept_step(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=20)
    row = next(read_jsonl(inputs["train"] / "samples.jsonl"))
    rows = [{**row, "step": step, "id": f"tickets:{n}"} for step in range(0, 101) for n in range(20)]
    write_jsonl(inputs["train"] / "samples.jsonl", rows)
    facts = load(inputs, settings.shows)
    facts.train["kept"]["value"] = 37
    film = filmstrip_section.view(RunReport(settings, facts, run_metrics.build_metrics(settings, facts)))
    steps = [frame.step for frame in film["strips"][0].frames]
    assert (steps[0], steps[-1], 37 in steps) == (0, 100, True) and len(steps) <= 13 and len(film["strips"]) == 12
    facts.train["kept"] = None
    view = run.build_view(RunReport(settings, facts, run_metrics.build_metrics(settings, facts)))
    words = " ".join(Page(html_page.render("report", view, ("report.css",))).words.split())
    assert "Of 101 evaluations 12 are shown" in words and "Shown are the first 12" in words


def test_a_training_that_went_on_from_an_adapter_does_not_begin_with_the_base(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=20)
    facts = load(inputs, settings.shows)
    facts.model["adapter"] = {"source": "org/first", "revision": None, "base": None}
    film = filmstrip_section.view(RunReport(settings, facts, run_metrics.build_metrics(settings, facts)))
    assert film["start"] == "start"
