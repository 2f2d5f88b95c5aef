"""The three replies that a reader sees first, and what to do next."""

import json

import pytest

from adder.report.facts import Paired
from adder.report.first_look import next_steps, telling
from report_pages import make, page_of


def sample(name, base, tuned, rights=(None, None), losses=(2.0, 1.0)):
    """A pair of replies; rights: their exact_match, None for texts that have none."""
    both = []
    for reply, right, loss in zip((base, tuned), rights, losses, strict=True):
        prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": f"Ask {name}"}]
        row = {"id": name, "prompt": prompt, "reference": "r", "reply": reply, "loss": loss, "labelled_tokens": 1}
        both.append(row if right is None else row | {"exact_match": right})
    return Paired(name, *both)


def test_the_most_the_middle_and_the_least_gained_are_shown():
    samples = [
        sample("lost", "a", "b", (1, 0)),
        sample("same", "a", "b", (0, 0), (2.0, 1.9)),
        sample("little", "a", "b", (0, 0), (2.0, 0.1)),
        sample("gained", "a", "b", (0, 1)),
        sample("gained more", "a", "b", (0, 1), (9.0, 0.1)),
    ]
    found = telling(samples, "exact_match")
    assert [one.prompt for one in found] == ["Ask gained more", "Ask little", "Ask lost"]
    assert [(one.base_right, one.tuned_right) for one in found] == [(False, True), (False, False), (True, False)]


def test_texts_that_nothing_can_equal_go_by_their_loss_and_have_no_mark():
    samples = [sample(str(n), "a", "b", losses=(2.0, loss)) for n, loss in enumerate((1.9, 0.5, 1.0))]
    found = telling(samples, "loss")
    assert [one.prompt for one in found] == ["Ask 1", "Ask 2", "Ask 0"]
    assert {(one.base_right, one.tuned_right) for one in found} == {(None, None)}


@pytest.mark.parametrize(
    ("losses", "first", "last"),
    [
        ((1.0, 1.5, 1.9), "most gained", "least gained"),
        ((1.0, 2.0, 2.5), "most gained", "most lost"),
        ((2.1, 2.2, 2.3), "least lost", "most lost"),
        ((2.0, 2.0, 2.0), "unchanged", "least gained"),
    ],
)
def test_what_gained_nothing_is_not_said_to_have_gained(losses, first, last):
    found = telling([sample(str(n), "a", "b", losses=(2.0, loss)) for n, loss in enumerate(losses)], "loss")
    assert (found[0].why, found[-1].why) == (first, last)


def test_plain_texts_have_no_replies_to_show():
    assert telling([sample("text", None, None)], "loss") == []


def test_long_replies_are_cut_with_a_word_on_what_is_left_out():
    (one,) = telling([sample("long", "x" * 500, "line\n\nline")], "loss")
    assert one.base.endswith("(320 more characters)")
    assert one.tuned == "line line"


@pytest.mark.parametrize(
    ("verdict", "guard", "diagnoses", "wrong", "first"),
    [
        ("better", None, [], 0, "Talk to both models"),
        ("better", None, [], 3, "Read the 3 replies"),
        ("better", {"passed": False}, [], 3, "Keep what the guard found lost"),
        ("can't tell", None, [], 3, "Hold out more rows: about 400"),
        ("worse", None, [], 3, "Try a gentler training"),
        (
            "worse",
            None,
            [{"name": "loss flat", "severity": "warning", "change": "x: 1"}],
            3,
            "The doctor found: loss flat",
        ),
        ("better", None, [{"name": "few steps", "severity": "note", "change": "x: 1"}], 0, "Talk to both models"),
    ],
)
def test_the_most_pressing_step_comes_first(verdict, guard, diagnoses, wrong, first):
    found = {"verdict": verdict, "needed_n": 396, "doubts": [], "difference": 0.1, "smallest_difference": 0.01}
    metrics = {"verdict": found, "guard": guard}
    steps = next_steps("my-run", metrics, diagnoses, wrong)  # type: ignore[arg-type]
    assert steps[0].text.startswith(first)
    assert len(steps) <= 3


def test_the_page_shows_replies_that_the_run_has(tmp_path):
    out = make(tmp_path)
    text = page_of(out).words
    (file,) = (tmp_path / "stages").glob("evaluate_tuned/*/samples.jsonl")
    rows = [json.loads(line) for line in file.open()]
    assert "most gained" in text and "least gained" in text
    assert any(" ".join(row["reply"].split())[:100] in text.partition("What to do next")[0] for row in rows)
    assert "adder chat results/default --both" in text
