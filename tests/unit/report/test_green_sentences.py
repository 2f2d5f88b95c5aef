"""Every green sentence of a report has a check behind it, and here a sabotage that takes the green away.

| green | the check behind it | the sabotage |
|---|---|---|
| the verdict's sentence, and "better" in each table | interval, p, smallest difference, doubts | `test_a_better_*` |
| Training: nothing found; the doctor's "nothing found" | doctor, preflight's warnings, advice | `test_a_training_*` |
| Held out: no training row left that has … | what `formatting` looked for and found | `test_rows_that_*` |
| Merged model: predicts as the trained one; "checked" | the proof's agreement | `test_a_merge_*` |
| Other tasks: the guard passes; "passed" | the drop that was measured | `test_a_guard_*` |
| Judge: win rate | the judge's verdict | `test_a_judge_*` |
| "same reply" of the reloaded model | merging refuses another one | tests/unit/merging/test_fresh_process_reply.py |
| "matches" beside a reply, on the first screen too | the reply's exact match | `test_a_reply_*`, test_first_look.py |
| Comparison: its verdict, "best", "better" | sure, and nothing against its own verdict | `test_better_than_*` |

The last is in comparison/test_page.py. Not green, but claims: what to do next (`test_a_step_*`), a run's last line at
the terminal (workflow/terminal/test_closing.py), what the model card tells of the scores (test_model_card.py).
"""

import re
from pathlib import Path

import pytest

from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.report.first_look import next_steps
from adder.report.sections import doctor_section, evaluation_section, merge_section, verdict_section
from report_fixture import write_stage_folders
from report_pages import make_again

REPORT = Path(verdict_section.__file__).parents[1]
# Places that can print green: a new one belongs into the table above, with its sabotage.
PLACES = {
    "sections/evaluation_section.py": 3,
    "sections/verdict_section.py": 8,
    "templates/doctor.html.jinja": 1,
    "templates/evaluation.html.jinja": 1,
    "templates/filmstrip.html.jinja": 2,
    "templates/merge.html.jinja": 2,
    "templates/samples.html.jinja": 3,
    "templates/verdict.html.jinja": 1,
    "comparison/page.py": 2,
}
GREEN = re.compile(r"\"good\"|'good'|mark good")


def test_no_place_prints_green_that_is_not_listed():
    found = {}
    for path in sorted([*REPORT.rglob("*.py"), *REPORT.rglob("*.jinja")]):
        if count := len(GREEN.findall(path.read_text(encoding="utf-8"))):
            found[path.relative_to(REPORT).as_posix()] = count
    assert found == PLACES


def report(tmp_path: Path, change=None, **how) -> tuple[dict, str]:
    """metrics.json and page of a made-up run; `change` may spoil its stages' folders."""
    settings, inputs = write_stage_folders(tmp_path / "stages", **{"heldout": 60, **how})
    if change:
        change(settings, inputs)
    out = make_again(tmp_path, settings, inputs)
    return read_json(out / "metrics.json"), (out / "report.html").read_text(encoding="utf-8")


def test_a_sound_run_is_green(tmp_path):
    metrics, page = report(tmp_path)
    assert metrics["verdict"]["verdict"] == "better" and metrics["verdict"]["doubts"] == []
    assert 'class="verdict better"' in page and page.count('<li class="is-good">') == 3


def test_a_better_model_whose_replies_are_none_is_not_green(tmp_path):
    def dots(settings, inputs):
        path = inputs["evaluate_tuned"] / "samples.jsonl"
        write_jsonl(
            path, [{**row, "reply": "........", "truncated": True, "exact_match": 0} for row in read_jsonl(path)]
        )
        for who in ("base", "tuned"):
            path = inputs[f"evaluate_{who}"] / "scores.json"
            scores = read_json(path)
            scores["heldout"]["exact_match"]["value"] = 0.0
            write_json(path, scores)

    metrics, page = report(tmp_path, dots)
    assert metrics["verdict"]["metric"] == "loss" and metrics["verdict"]["verdict"] == "can't tell"
    assert 'class="verdict unsure"' in page and "nothing found of what" not in page
    assert {one["name"] for one in metrics["doctor"]} >= {"replies never end", "replies repeat", "replies all alike"}
    assert '<li class="is-bad"><a href="#replies">' in page


def test_a_better_model_that_says_its_prompt_again_is_not_green(tmp_path):
    def echo(settings, inputs):
        path = inputs["evaluate_tuned"] / "samples.jsonl"
        write_jsonl(path, [{**row, "reply": row["prompt"][-1]["content"]} for row in read_jsonl(path)])

    metrics, page = report(tmp_path, echo)
    assert "replies echo the prompt" in {one["name"] for one in metrics["doctor"]}
    assert metrics["verdict"]["verdict"] == "can't tell" and '<li class="is-bad"><a href="#replies">' in page
    words = {entry["verdict"] for entry in metrics["heldout"].values()}
    assert "better" not in words and "change good" not in page


def test_a_better_by_less_than_matters_is_not_green(tmp_path):
    def large(settings, inputs):
        settings.smallest_difference |= dict.fromkeys(settings.smallest_difference, 1.0)

    metrics, page = report(tmp_path, large)
    assert metrics["verdict"]["verdict"] != "better" and 'class="verdict unsure"' in page


def test_a_training_with_a_finding_or_a_warning_is_not_green():
    found = {"name": "learning rate far off", "severity": "warning", "step": None}
    assert verdict_section.doctor_line([found], []).tone == "unsure"
    assert verdict_section.doctor_line([], ["the base was never trained on <|im_start|>"]).tone == "unsure"
    assert verdict_section.doctor_line([], []).tone == "good"


def test_a_training_at_a_rate_a_hundred_times_off_is_not_green(tmp_path):
    def slow(settings, inputs):
        path = inputs["train"] / "stage.json"
        record = read_json(path)
        record["settings"]["learning_rate"] = 1e-6
        write_json(path, record)

    metrics, page = report(tmp_path, slow)
    assert "learning rate far off" in {one["name"] for one in metrics["doctor"]}
    assert 'class="verdict unsure"' in page and "the doctor warns of learning rate far off" in page
    assert "✓ nothing found" not in page


def test_what_the_doctor_did_not_look_for_is_not_claimed(tmp_path):
    """Without an evaluation and sampled replies nothing is known of these."""
    _, page = report(tmp_path, eval_loss=False, json_replies=False)
    assert "a held-out loss that rises" not in page and "a loss that stays flat" in page


@pytest.mark.parametrize("spoilt", [{"found": 6, "dropped": 2}, {"looked_for": ["the prompt"]}])
def test_rows_that_stay_or_were_not_looked_for_are_not_green(spoilt):
    overlap = {"action": "drop", "found": 6, "dropped": 6, "looked_for": ["a", "b", "c", "d"]}
    assert verdict_section.data_line(overlap, 40).tone == "good"
    assert verdict_section.data_line(overlap | spoilt, 40).tone != "good"


def test_a_merge_that_predicts_otherwise_is_not_green():
    proof = {"checked": True, "top_token_agreement": 0.998}
    assert verdict_section.merge_line(proof, False).tone == "good" and merge_section.is_faithful(proof)
    for spoilt in (proof | {"top_token_agreement": 0.5}, proof | {"checked": False}, {"checked": True}):
        assert verdict_section.merge_line(spoilt, False).tone == "unsure"
    assert not merge_section.is_faithful(proof | {"top_token_agreement": 0.5})
    assert verdict_section.merge_line({"checked": True}, True).tone == "calm"


def test_a_guard_that_fails_is_not_green(tmp_path):
    def strict(settings, inputs):
        settings.tasks[0].max_drop = 0.0

    _, page = report(tmp_path, strict, tasks=("gsm8k",))
    assert "the guard passes" not in page and '<li class="is-bad"><a href="#tasks">' in page


@pytest.mark.parametrize(
    ("verdict", "found", "sabotaged"),
    [
        ("Hold out more rows", {"verdict": "can't tell"}, {"needed_n": None}),
        ("Hold out more rows: about 400 would tell a diff", {"verdict": "can't tell"}, {"smallest_difference": 0.2}),
        ("Hold out more rows", {"verdict": "can't tell"}, {"doubts": ["20 of 20 tuned replies are cut off"]}),
        ("Try a gentler training", {"verdict": "worse"}, {"verdict": "better"}),
    ],
)
def test_a_step_is_shown_only_with_what_it_rests_on(verdict, found, sabotaged):
    def first(**changes):
        figures = {"needed_n": 400, "doubts": [], "difference": 0.1, "smallest_difference": 0.01}
        known = {"verdict": "better"} | figures | found | changes
        return next_steps("run", {"verdict": known, "guard": None}, [], 0)[0].text  # type: ignore[typeddict-item]

    assert first().startswith(verdict) and not first(**sabotaged).startswith(verdict)


def test_a_judge_that_prefers_the_base_or_neither_is_not_green():
    judge = {"win_rate": {"value": 0.6}, "pairs": 50}
    tones = {
        word: verdict_section.judge_line({**judge, "verdict": word}).tone
        for word in ("better", "worse", "no difference")
    }
    assert tones == {"better": "good", "worse": "bad", "no difference": "calm"}


def test_a_reply_that_is_wrong_is_not_green(tmp_path):
    _, page = report(tmp_path, right=0.0, heldout=12)
    first, tuned = page[: page.index("What to do next")], page[page.index('id="replies"') :]
    assert 'title="matches"' not in first and 'title="differs"' in first
    assert "✓ matches" not in tuned and "✗ differs" in tuned
    assert evaluation_section.TONES == {"better": "good", "worse": "bad"} and doctor_section.SEVERITIES
