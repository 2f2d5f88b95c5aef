"""Stages that no section knows: what they show stands on the page, in run.yaml and in the cost all the same."""

import yaml

from adder.core.files import read_json, write_json, write_jsonl
from adder.report.sections import other_section
from report_fixture import HOSTILE, stage_record, write_stage_folders
from report_pages import make_again, page_of, section


def test_what_a_further_stage_shows_is_on_the_page_and_its_choices_in_run_yaml(tmp_path, finished):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    folder = inputs["vocabulary"] = tmp_path / "stages" / "vocabulary" / "0123456789ab"
    folder.mkdir(parents=True)
    choice = {"value": 30_000, "reason": "rarer words are noise", "alternatives": []}
    write_json(folder / "vocabulary.json", {"different_words": 20_417, "unknown_share": 0.031, "limit": choice})
    write_jsonl(folder / "words.jsonl", [{"word": HOSTILE}, {"word": "b"}])
    write_json(folder / "stage.json", stage_record("vocabulary", folder, False, False))
    settings.stages["vocabulary"] = folder.name
    settings.shows["vocabulary"] = {"vocabulary": "vocabulary.json", "words": "words.jsonl"}
    out = make_again(tmp_path, settings, inputs)
    shown = section(out, "other").replace("\u00a0", " ")
    assert "vocabulary different words 20,417 limit 30,000 rarer words are noise unknown share 3.1 %" in shown
    assert "words 2 rows" in shown
    assert "other" in [attrs["href"][1:] for tag, attrs in page_of(out).tags if attrs.get("href", "").startswith("#")]
    assert "vocabulary.limit 30000" in section(out, "choices")
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert record["settings"]["vocabulary.limit"]["from"] == "chosen" and "vocabulary" in record["stages"]
    assert "vocabulary" in read_json(out / "metrics.json")["cost"]["seconds"]
    assert "Further stages" not in page_of(finished).words


def test_figures_are_written_by_what_their_names_say():
    content = {"loss": {"train": 0.5, "best": None}, "sure": True, "waste": 0.25, "rows": [1, 2], "note": "as set"}
    assert other_section.figures({"checks": content}) == [
        ("train", "0.500", "loss"), ("best", "–", "loss"), ("sure", "yes", ""), ("waste", "25.0\u00a0%", ""),
        ("note", "as set", ""),
    ]  # fmt: skip
