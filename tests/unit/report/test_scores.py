"""Base against tuned: differences paired by row, losses by token, rows in groups."""

import numpy as np
import pytest

from adder.core import intervals
from adder.core.files import read_json, read_jsonl, write_jsonl
from adder.report import scores
from adder.report.facts import PairedSample, TaskFacts
from adder.report.stage import TaskLimit
from report_fixture import write_stage_folders
from report_pages import make_again, section


def test_f1_and_perplexity_are_compared_row_by_row():
    """Rows are hard or easy for both models alike, so unpaired intervals would be several times as wide."""

    def row(right, loss, tokens):
        fields = {name: {"expected": "x", "found": "x" if n < right else "y", "correct": n < right}
                  for n, name in enumerate("abcd")}  # fmt: skip
        return {"reply": "{}", "fields": fields, "loss": loss, "labelled_tokens": tokens}

    base = [row(n % 4, 0.5 + n % 4, 5 + n % 7) for n in range(60)]
    tuned = [row(n % 4 + (n % 3 == 0), 0.4 + n % 4, 5 + n % 7) for n in range(60)]
    f1 = scores.difference("field_f1", base, tuned)
    assert f1["value"] == pytest.approx(20 / 240) and f1["p"] < 0.001  # of 240 values in all, 20 more are right
    assert 0.04 < f1["ci95"][0] < f1["value"] < f1["ci95"][1] < 0.13
    tokens = np.array([one["labelled_tokens"] for one in base])
    loss = (tokens * np.array([one["loss"] for one in base])).sum() / tokens.sum()
    found = scores.difference("perplexity", base, tuned)
    assert found["value"] == pytest.approx(np.exp(loss - 0.1) - np.exp(loss)) and found["p"] < 0.001
    apart = intervals.perplexity(intervals.ratio(tokens * [one["loss"] for one in base], tokens))["ci95"]
    assert found["ci95"][1] - found["ci95"][0] < 0.2 * (apart[1] - apart[0])


def test_a_task_may_call_its_score_as_a_held_out_one_is_called():
    score = {"value": 0.5, "ci95": [0.4, 0.6], "n": 3}
    own = {"metric": "loss", "metrics": {"loss": score}, "version": 1, "higher_is_better": False, "num_fewshot": 0}
    samples = [PairedSample(f"{n}", {"loss": 0.5 + n}, {"loss": 0.4 + n}) for n in range(9)]
    (row,) = scores.compare_tasks([TaskFacts(own, own, samples)], [TaskLimit(task="mine", max_drop=None)])
    assert row["verdict"] == "better" and row["difference"]["value"] == pytest.approx(-0.1)


def loss_of(rows):
    sums = scores.sums("loss", rows)
    return sums.tops.sum() / sums.bottoms.sum()


def test_a_row_without_labelled_tokens_weighs_nothing_in_the_loss():
    rows = [{"loss": 1.0, "labelled_tokens": 30}, {"loss": 0.0, "labelled_tokens": 0}]
    assert loss_of(rows) == pytest.approx(1.0)


def test_loss_counts_each_row_by_its_tokens():
    rows = [{"loss": 1.0, "labelled_tokens": 30}, {"loss": 4.0, "labelled_tokens": 10}]
    assert loss_of(rows) == pytest.approx((30 + 40) / 40)


def test_rows_in_groups_are_less_sure_and_the_page_says_so(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=60, groups=6, right=0.3)
    path = inputs["evaluate_tuned"] / "samples.jsonl"
    # Whole groups are right: 60 rows that tell no more than 6 do.
    rows = [row | {"exact_match": int(int(row["group"], 16) < 3)} for row in read_jsonl(path)]
    write_jsonl(path, rows)
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["verdict"]["groups"] == 6 and metrics["verdict"]["verdict"] == "can't tell"
    assert "60 held-out rows in 6 groups" in metrics["verdict"]["sentence"]
    words = section(out, "evaluation")
    assert "The rows come in 6 groups (data.heldout.group_by)" in words and "a group favours" in words
    for who in ("base", "tuned"):
        path = inputs[f"evaluate_{who}"] / "samples.jsonl"
        write_jsonl(path, [{key: row[key] for key in row if key != "group"} for row in read_jsonl(path)])
    out = make_again(tmp_path, settings, inputs)
    metrics = read_json(out / "metrics.json")
    assert metrics["verdict"]["groups"] is None and metrics["verdict"]["verdict"] == "better"
    assert "groups" not in section(out, "evaluation")
