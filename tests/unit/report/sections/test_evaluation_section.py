"""The evaluation section: scores with how sure they are, fields, tasks, the guard, the judge."""

import re

import pytest

from adder.core.files import read_json, write_json
from adder.report.sections import evaluation_section
from report_fixture import write_stage_folders
from report_pages import make_again, page_of, section


def test_scores_say_what_they_mean_how_sure_and_on_how_many_rows(everything):
    words = section(everything, "evaluation").replace("\u00a0", " ")
    assert "Exact match replies that say what their reference says" in words
    exact = read_json(everything / "metrics.json")["heldout"]["exact_match"]
    low, high = (f"{100 * end:+.1f}" for end in exact["difference"]["ci95"])
    assert f"+{100 * exact['difference']['value']:.1f} points {low} to {high} < 0.001 200 better" in words
    assert "3 replies were cut off at the limit of 69" in words


def test_tasks_show_what_was_lost_and_the_guard_names_it(everything, finished):
    metrics = read_json(everything / "metrics.json")
    assert metrics["guard"] == {"passed": False, "failed": ["gsm8k", "arc_easy"]}
    assert [(row["task"], row["verdict"], row["guard"]) for row in metrics["tasks"]] == [
        ("gsm8k", "worse", "failed"), ("arc_easy", "worse", "failed"), ("my_tone", "better", None),
    ]  # fmt: skip
    for row in metrics["tasks"]:
        assert row.keys() == {
            "task", "version", "metric", "higher_is_better", "num_fewshot", "base", "tuned", "difference", "verdict",
            "smallest_difference",
            "max_drop", "guard",
        }  # fmt: skip
        assert row["difference"].keys() == {"value", "ci95", "p"} and row["base"].keys() == {"value", "ci95", "n"}
        # Means of 60 to 400 zeros and ones in double precision.
        assert row["difference"]["value"] == pytest.approx(row["tuned"]["value"] - row["base"]["value"], abs=1e-12)
    words = section(everything, "evaluation").replace("\u00a0", " ")
    assert "arc_easy acc_norm; 0 examples in the prompt; the first 400 documents" in words
    assert "✗ failed may lose 3.0 points" in words and "✓ passed" not in words
    assert "arc_easy: 40 documents worse than before, 0 better" in words and "tuned says" in words
    assert "arc_easy: acc_norm got worse by 0.1" in words
    quiet = read_json(finished / "metrics.json")
    assert quiet["tasks"] == [] and quiet["guard"] is None and quiet["judge"] is None
    assert "Other tasks" not in page_of(finished).words


def test_a_guard_that_passes_and_a_task_in_which_lower_is_better(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, tasks=("arc_easy", "my_tone"))
    settings.tasks[0].max_drop = 0.01
    for who in ("base", "tuned"):
        path = inputs[f"task_{who}_0"] / "scores.json"
        write_json(path, read_json(path) | {"higher_is_better": False})
        path = inputs[f"task_{who}_1"] / "scores.json"
        parts = {f"tone_{n}": {"value": 0.5, "n": 30} for n in range(2)}
        write_json(path, read_json(path) | {"subtasks": parts, "chat_template": False, "prompts_cut": 2})
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["guard"] == {"passed": True, "failed": []} and metrics["tasks"][0]["verdict"] == "better"
    words = section(out, "evaluation").replace("\u00a0", " ")
    assert "lower is better" in words and "arc_easy: 0 documents worse" not in words and "✓ passed" in words
    assert "asked without the chat template; 2 prompts lost their beginning" in words
    assert "my_tone: its 2 parts" in words and "tone_1 30 50.0 % 50.0 %" in words
    assert "Other tasks 2 better; the guard passes" in section(out, "verdict")


def test_the_judge_is_shown_with_what_speaks_against_the_tuned_model_first(everything):
    words = section(everything, "evaluation").replace("\u00a0", " ")
    judge = read_json(everything / "metrics.json")["judge"]
    assert judge["sentence"] in words and "It was told: “Is every field right?”" in words
    assert f"tuned preferred {judge['wins']} tie {judge['ties']} base preferred {judge['losses']}" in words
    assert f"Order decided {judge['inconsistent']} pairs in which the orders disagree" in words
    outcomes = re.findall(
        r'<details class="judgement"><summary><span class="mark \w+">(.*?)</span>',
        (everything / "report.html").read_text(encoding="utf-8"),
    )
    assert list(dict.fromkeys(outcomes)) == ["base preferred", "order decides", "tie", "tuned preferred"]
    rows = [{"first": one, "second": other} for one, other in (("tuned", "tuned"), ("tuned", "tie"), ("base", "base"))]
    assert [evaluation_section.outcome(row) for row in rows] == ["win", "inconsistent", "loss"]


def test_fields_show_their_difference_and_how_sure_it_is(finished):
    fields = read_json(finished / "metrics.json")["fields"]
    assert list(fields) and all(entry.keys() == {"base", "tuned", "difference", "verdict"} for entry in fields.values())
    amount = fields["amount"]
    assert amount["base"]["precision"] is None and amount["difference"]["precision"] is None  # the base gave none
    gain = amount["difference"]["f1"]
    assert gain["value"] == pytest.approx(amount["tuned"]["f1"] - amount["base"]["f1"]) and gain["p"] < 0.001
    words = section(finished, "evaluation").replace("\u00a0", " ")
    low, high = (f"{100 * end:+.1f}" for end in gain["ci95"])
    assert f"{100 * amount['tuned']['f1']:.1f} % {100 * gain['value']:+.1f} , {low} to {high}" in words
    assert "tuned precision tuned recall tuned is" in words and "this one is missing" not in words


def test_only_a_difference_that_is_better_or_worse_gets_a_colour():
    assert evaluation_section.TONES == {"better": "good", "worse": "bad"}
    score = {"value": 0.5, "ci95": [0.4, 0.6], "n": 9}
    entry = {"base": score, "tuned": score, "difference": {"value": 0.4, "ci95": [0.2, None], "p": 0.001}}
    for word, colour in (("better", "good"), ("worse", "bad"), ("no difference", ""), ("can't tell", ""), (None, "")):
        row = evaluation_section.compared_score("exact_match", {**entry, "verdict": word})
        assert (row.tone, row.word) == (colour, word or "–")
