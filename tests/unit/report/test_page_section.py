"""Sections and their templates belong together: names, anchors, and what each shows."""

import pytest

from adder.report.facts import load
from adder.report.html_page import TEMPLATES
from adder.report.page_section import PageSection, RunReport
from adder.report.run import SECTIONS
from adder.report.run_metrics import build_metrics
from report_fixture import write_stage_folders


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_sections_template_has_its_anchor_and_a_title_that_names_it(section: PageSection):
    text = (TEMPLATES / f"{section.name}.html.jinja").read_text(encoding="utf-8")
    assert f'<section id="{section.anchor}"' in text
    assert f'aria-labelledby="{section.anchor}-title"' in text and f'<h2 id="{section.anchor}-title"' in text


def test_no_two_sections_share_a_name_or_an_anchor():
    for names in ([section.name for section in SECTIONS], [section.anchor for section in SECTIONS]):
        assert len(set(names)) == len(names)


def test_a_section_without_anything_to_show_says_so(tmp_path):
    settings, inputs = write_stage_folders(tmp_path, heldout=5)
    (inputs["train"] / "samples.jsonl").unlink()
    facts = load(inputs, settings.shows)
    report = RunReport(settings, facts, build_metrics(settings, facts))
    assert {section.name for section in SECTIONS if not section.view(report)} == {"filmstrip", "other"}
