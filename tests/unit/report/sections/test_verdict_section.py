"""The verdict: the alarming first, no colour without being sure."""

import re
from types import SimpleNamespace

from adder.core.files import read_json
from adder.evaluation.degenerate_replies import ReplyFaults
from adder.report.sections import (
    verdict_section,
)
from page_parser import Page
from report_pages import make, page_of


def test_the_summary_tells_the_alarming_first(everything, tmp_path):
    lines = re.findall(r'<li class="is-(\w+)">(.*?)</li>', (everything / "report.html").read_text(encoding="utf-8"))
    words = [" ".join("".join(Page(line).text).split()) for _, line in lines]
    assert [tone for tone, _ in lines] == ["bad", "good", "good", "good", "good", "calm"]
    assert words[0] == "✗Other tasks the guard fails this run: gsm8k lost 2.4 points; arc_easy lost 10.0 points"
    assert "no training row left that has of any of the 200 held-out rows: the prompt, over 50 % " in words[2]
    assert words[2].endswith(" or 80 % of the row's 3-word sequences, its own words among them")
    assert words[5].replace("\u00a0", " ") == "Cost 15 min 41 s, 0.63 EUR, 11.8 Wh"
    out = make(tmp_path, course="spiky", right=0.0, heldout=20)
    lines = re.findall(r'<li class="is-(\w+)">(.*?)</li>', (out / "report.html").read_text(encoding="utf-8"))
    words = [" ".join("".join(Page(line).text).split()) for _, line in lines]
    assert [tone for tone, _ in lines] == ["unsure", "unsure", "good", "good", "calm"]
    assert words[:2] == [
        "!Training loss spikes at step 67",
        "!Replies none of the 20 tuned replies is just as its reference",
    ]  # fmt: skip


def test_other_scores_are_told_where_they_say_more_or_the_opposite():
    words = {"exact_match": "can't tell", "field_f1": "better", "loss": "worse", "perplexity": "worse"}
    heldout = {name: {"verdict": word} for name, word in words.items()}
    line = verdict_section.scores_line({"verdict": "can't tell", "metric": "exact_match"}, heldout)
    assert (line.tone, line.text) == ("unsure", "surely better: Field F1; surely worse: Held-out loss")
    del heldout["loss"]
    line = verdict_section.scores_line({"verdict": "can't tell", "metric": "exact_match"}, heldout)
    assert (line.tone, line.text) == ("calm", "surely better: Field F1")
    assert verdict_section.scores_line({"verdict": "better", "metric": "exact_match"}, heldout) is None
    assert verdict_section.scores_line({"verdict": "worse", "metric": "exact_match"}, heldout).tone == "unsure"


def test_a_model_that_fails_its_guard_is_not_shown_in_green():
    metrics = {"verdict": {"verdict": "better", "doubts": []}, "guard": {"passed": False}}
    assert verdict_section.tone(metrics) == "unsure" and verdict_section.tone(metrics | {"guard": None}) == "better"
    assert verdict_section.tone({"verdict": {"verdict": "can't tell"}, "guard": None}) == "unsure"


def test_rows_that_overlap_and_stay_are_an_alarm():
    stays = verdict_section.data_line({"action": "report", "found": 6, "dropped": 1}, 40)
    assert stays.tone == "unsure" and stays.text.startswith("5 training rows ask much of what")
    off = verdict_section.data_line({"action": "off", "found": 0, "dropped": 0, "looked_for": ["the prompt"]}, 40)
    assert off.tone == "calm"  # what was not looked for is not claimed
    assert off.text == "no training row left that has of any of the 40 held-out rows: the prompt"


def test_too_few_rows_to_tell(tmp_path):
    out = make(tmp_path, heldout=12, right=0.2)
    verdict = read_json(out / "metrics.json")["verdict"]
    assert verdict["verdict"] == "can't tell" and verdict["needed_n"] > 12
    text = (out / "report.html").read_text(encoding="utf-8")
    assert 'class="verdict unsure"' in text and verdict["sentence"] in page_of(out).words


def test_free_text_is_told_by_how_near_it_comes_not_by_none_being_equal():
    facts = SimpleNamespace(
        faults=ReplyFaults(replies=40, unended=0, empty=0, circling=0, alike=0, echoing=0, faulty=0)
    )
    values = {"exact_match": (0.0, 0.0), "rouge_l": (0.11, 0.42), "chrf": (0.2, 0.5)}
    heldout = {
        name: {"base": {"value": base, "n": 40}, "tuned": {"value": tuned, "n": 40}}
        for name, (base, tuned) in values.items()
    }
    line = verdict_section.reply_line(facts, heldout)
    assert line.tone == "calm" and line.text.startswith("free text, none word for word its reference; ROUGE-L ")
    assert "chrF" in line.text
    line = verdict_section.reply_line(facts, {"exact_match": heldout["exact_match"]})
    assert line.tone == "unsure" and line.text == "none of the 40 tuned replies is just as its reference"
    cut_off = SimpleNamespace(
        faults=ReplyFaults(replies=40, unended=30, empty=0, circling=0, alike=0, echoing=0, faulty=30)
    )
    assert verdict_section.reply_line(cut_off, heldout).tone == "bad"


def test_two_zeros_have_no_interval_of_a_difference(tmp_path):
    out = make(tmp_path, json_replies=False, right=0.0, heldout=20)
    heldout = read_json(out / "metrics.json")["heldout"]
    assert heldout["exact_match"]["base"]["value"] == heldout["exact_match"]["tuned"]["value"] == 0
    text = page_of(out).words
    assert "+0.0 points" not in text and "both 0" in text
    alone = verdict_section.cards({"exact_match": heldout["exact_match"]}, "exact_match")
    assert [(card.difference, card.ci) for card in alone] == [(None, None)]
