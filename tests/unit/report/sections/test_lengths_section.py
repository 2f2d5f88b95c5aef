"""Sequence length and packing: the chosen length, what each would cost, what is lost."""

from adder.report.facts import load
from adder.report.page_section import RunReport
from adder.report.run_metrics import build_metrics
from adder.report.sections import lengths_section
from report_fixture import write_stage_folders
from report_pages import section


def test_the_chosen_length_stands_among_those_that_were_weighed(finished):
    words = section(finished, "lengths").replace("\u00a0", " ")
    assert "max_seq_length 256 tokens packing on" in words and "256 chosen" in words
    assert "Truncation: drop ; 3 examples of 980 are longer and dropped" in words
    assert "What each length would cost length" in words


def test_without_packing_an_example_is_a_sequence(tmp_path):
    settings, inputs = write_stage_folders(tmp_path, heldout=5)
    facts = load(inputs, settings.shows)
    facts.lengths["packing"]["value"] = False
    view = lengths_section.view(RunReport(settings, facts, build_metrics(settings, facts)))
    assert ("packing", "off", "one example a sequence") in view["figures"]
