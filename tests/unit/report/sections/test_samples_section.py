"""Replies before and after: the worst first, differences marked."""

from adder.core.files import read_jsonl, write_jsonl
from adder.report.facts import PairedSample, load
from adder.report.sections import samples_section
from report_fixture import write_stage_folders
from report_pages import make, make_again, section


def test_free_text_is_shown_by_how_near_it_comes_the_farthest_first(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=30, json_replies=False, right=0.2)
    path = inputs["evaluate_tuned"] / "samples.jsonl"
    rows = [row | {"exact_match": 0} for row in read_jsonl(path)]
    write_jsonl(path, [row | ({"chrf": 0.01} if row["id"] == "tickets:7" else {}) for row in rows])
    samples = load(inputs, settings.shows).samples
    first = samples_section.select_samples(samples, 10)["rows"][0]
    assert first.id == "tickets:7" and first.tuned.scores[1].replace("\u00a0", " ") == "chrF 1.0 %"
    words = section(make_again(tmp_path, settings, inputs), "evaluation")
    assert "ROUGE-L words that reply and reference have in common" in words and "Field by field" not in words
    assert "Why these scores: the references are free text." in words


def test_tool_calls_in_a_prompt_are_shown():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert samples_section.turn_text(turn) == 'get_weather({"city": "Oslo"})'
    row = {"id": "a:1", "prompt": [{"role": "user", "content": "Weather?"}, turn], "reference": "Rain", "reply": "Rain"}
    row |= {"exact_match": 1, "loss": 0.1}
    shown = samples_section.prepare(PairedSample("a:1", row, row), 0, None)
    assert [one["content"] for one in shown.turns] == ["Weather?", 'get_weather({"city": "Oslo"})']


def test_worst_samples_come_first_and_right_ones_keep_a_place(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=100, right=0.3)
    samples = load(inputs, settings.shows).samples
    chosen = samples_section.select_samples(samples, 30)
    marks = [row.tuned.right for row in chosen["rows"]]
    assert marks == [False] * 20 + [True] * 10
    losses = [row.loss for row in chosen["rows"][:20]]
    assert losses == sorted(losses, reverse=True)
    assert (chosen["shown"], chosen["total"], chosen["wrong"] + chosen["right"]) == (30, 100, 100)
    few_right = [s._replace(tuned={**s.tuned, "exact_match": int(n < 3)}) for n, s in enumerate(samples)]
    assert [row.tuned.right for row in samples_section.select_samples(few_right, 30)["rows"]].count(True) == 3


def test_only_the_differing_value_is_marked_whatever_the_order_of_keys():
    reference = '{"intent": "refund", "amount": 19.99, "date": "2026-05-03"}'
    marked, unlike = samples_section.mark(
        reference, '{"date": "2026-05-04", "amount": 19.99, "intent": "refund"}', False
    )
    assert not unlike
    assert [(kind, text) for kind, text in marked if kind != "same"] == [
        ("missing", "2026-05-03"), ("wrong", "2026-05-04"),
    ]  # fmt: skip
    assert samples_section.mark(reference, "I am sorry to hear that.", False) == (
        [("same", "I am sorry to hear that.")], True,
    )  # fmt: skip
    assert samples_section.mark(reference, "", False) == ([("same", "")], False)


def test_replies_on_the_page_are_counted_as_such(tmp_path, finished):
    words = section(finished, "replies")
    assert "Shown" not in words and "shown, the worst" not in words
    assert "On this page are 60, those that went worst first; all stand" in words
    assert "60 of 60 shown" in words
    assert "All are on this page, the worst first." in section(make(tmp_path, heldout=12), "replies")
