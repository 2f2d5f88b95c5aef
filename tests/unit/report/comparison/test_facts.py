"""Which run is best and how sure that is: pairs by row, corrected for their number."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.core.intervals import Sums
from adder.report.comparison import facts
from compare_fixture import change_metrics, copy_run, write_run


def test_runs_are_compared_row_by_row(tmp_path):
    """The same replies but for six rows that one run has wrong: as independent samples nobody could tell."""
    first = write_run(tmp_path, "first", right=0.5)
    second = copy_run(first, tmp_path, "second", 0.0, {}, 400)
    rows = list(read_jsonl(first["evaluate_tuned"] / "samples.jsonl"))
    right = [row["id"] for row in rows if row["exact_match"]]
    write_jsonl(
        second["evaluate_tuned"] / "samples.jsonl",
        # In another order, too: rows belong together by their ids.
        [row | {"exact_match": int(row["exact_match"] and row["id"] not in right[:6])} for row in reversed(rows)],
    )
    metrics = read_json(second["report"] / "metrics.json")
    metrics["heldout"]["exact_match"]["tuned"]["value"] = (len(right) - 6) / len(rows)
    write_json(second["report"] / "metrics.json", metrics)
    found = facts.compare({"first": first, "second": second})
    difference = found.runs[1].against_best
    assert difference.paired and difference.sure and difference.p == pytest.approx(2 * 0.5**6)
    rows = [facts.held_out("exact_match", run["evaluate_tuned"] / "samples.jsonl") for run in (first, second)]
    assert facts.independent("exact_match", *(run.sums for run in rows)).p > 0.4
    # Rows of one group are one: five groups can't tell.
    groups = [f"{n % 5}" for n in range(len(rows[0].items))]
    in_groups = [replace(run, sums=replace(run.sums, clusters=groups)) for run in rows]
    grouped = facts.difference("exact_match", *in_groups, 0.0)
    assert grouped.value == difference.value and grouped.p > 0.05


def test_runs_on_different_rows_are_compared_as_independent_samples():
    ones = [Sums(np.array(values), np.ones(len(values))) for values in ([1.0] * 15 + [0.0] * 5, [1.0] * 4 + [0.0] * 21)]
    found = facts.independent("exact_match", *ones)
    assert found.value == pytest.approx(0.16 - 0.75) and not found.paired
    # Newcombe's method 10, of Wilson's 0.5313 to 0.8881 and 0.0640 to 0.3465.
    assert found.ci95 == pytest.approx([-0.59 - 0.1681, -0.59 + 0.2875], abs=1e-3) and found.p < 0.001
    # A loss of one row and another of one row: nothing can be told.
    single = [Sums(np.array([loss]), np.array([7.0])) for loss in (3.0, 5.0)]
    assert facts.independent("loss", *single) == facts.Difference(value=pytest.approx(2 / 7))
    # Two alike rows of a group tell no more than one.
    losses = [Sums(factor * np.array([3.0, 5.0, 4.0]), np.array([7.0, 8.0, 9.0])) for factor in (1, 2)]
    twice = [Sums(np.repeat(one.tops, 2), np.repeat(one.bottoms, 2), np.repeat(np.arange(3), 2)) for one in losses]
    assert facts.independent("loss", *twice).ci95 == pytest.approx(facts.independent("loss", *losses).ci95)


def test_long_and_short_rows_at_one_loss_can_be_told_apart():
    """The doubt is about losses a token; that rows differ in length is none. Once, such runs always tied."""
    random = np.random.default_rng(5)
    runs = []
    for number, level in enumerate((0.5, 0.55)):
        tokens = np.round(np.exp(random.normal(3.5, 0.9, 300)))
        losses = random.normal(level, 0.05, 300) * tokens
        items = [(f"{number}:{n}", "") for n in range(300)]
        runs.append(facts.HeldOut(items=items, sums=Sums(losses, tokens), tokens=tokens.tolist()))
    (found,) = facts.judge_differences([facts.difference("loss", *runs, 0.0)], 0.01)
    assert found.sure and not found.paired and found.ci95[1] - found.ci95[0] < 0.04


def test_a_difference_that_does_not_matter_makes_no_run_the_best():
    small = facts.Difference(value=0.001, p=1e-9, ci95=[0.0005, 0.0015])
    assert facts.judge_differences([small])[0].sure
    judged = facts.judge_differences([small], 0.01)[0]
    assert not judged.sure and not judged.matters


def test_p_is_corrected_for_the_pairs_that_are_still_in_question():
    differences = [facts.Difference(value=0.15, p=p, ci95=[0.1, 0.2]) for p in (0.01, 0.04, 0.03, 0.004)]
    judged = facts.judge_differences(differences)
    # Sorted: 0.004 x 10 pairs of five runs, 0.01 x 6 of four, 0.03 x 3, 0.04 x 1, none below the one before it.
    assert [one.p_corrected for one in judged] == pytest.approx([0.06, 0.09, 0.09, 0.04])
    assert [one.sure for one in judged] == [False, False, False, True]
    across = [facts.Difference(value=0.1, p=1e-5, ci95=ends) for ends in ([-0.1, 0.2], None)]
    assert not any(one.sure for one in facts.judge_differences(across))


def test_equal_runs_are_seldom_told_apart_however_many_there_are():
    """Twelve runs that are all right in 70 % of 150 rows: a run called worse than the best would be wrong.

    At most 5 % of the tries may have one; of 400 tries more than 31 would with a probability below 1 %. If each p were
    only multiplied by the eleven comparisons, it would be about 70.
    """
    random, wrong = np.random.default_rng(3), 0
    for _ in range(400):
        # Rows of their own: independent samples, whose p is not on the safe side as McNemar's is.
        runs = [
            facts.HeldOut([(f"{run}:{n}", "") for n in range(150)], Sums(values.astype(float), np.ones(150)))
            for run, values in enumerate(random.random((12, 150)) < 0.7)
        ]
        runs.sort(key=lambda run: -run.sums.tops.mean())
        differences = [facts.difference("exact_match", runs[0], run, 0.0) for run in runs[1:]]
        wrong += any(one.sure for one in facts.judge_differences(differences))
    assert wrong <= 31


def test_many_runs_are_told_apart_by_their_loss():
    """Ten thousand draws of signs have no p below 1e-4, which times the 1,225 pairs of fifty runs would be 0.12."""
    random = np.random.default_rng(4)
    items, tokens = [(str(n), "") for n in range(200)], [40] * 200
    hard = random.lognormal(0, 0.5, 200)
    runs = [facts.HeldOut(items, Sums(40 * hard * (0.1 + 0.02 * n), tokens), tokens) for n in range(50)]
    differences = [facts.difference("loss", runs[0], run, 0.0) for run in runs[1:]]
    assert all(one.sure for one in facts.judge_differences(differences))


def test_runs_without_a_score_in_common_are_refused(tmp_path):
    runs = {name: write_run(tmp_path, name) for name in ("a", "b")}
    heldout = read_json(runs["a"]["report"] / "metrics.json")["heldout"]
    change_metrics(runs["a"], heldout={"exact_match": heldout["exact_match"]})
    change_metrics(runs["b"], heldout={"loss": heldout["loss"]})
    with pytest.raises(UserError, match="no held-out score in common: a has exact_match; b has loss"):
        facts.compare(runs)


def test_run_yaml_is_read_as_it_is_written(tmp_path):
    run = write_run(tmp_path, "a", {"train.learning_rate": 1e-5})
    assert yaml.safe_load((run["report"] / "run.yaml").read_text())["settings"]["train.learning_rate"]["value"] == 1e-5
    assert facts.load("a", run).setting("train.learning_rate") == 1e-5


def test_a_value_that_one_run_sets_and_another_leaves_to_the_stage_counts_as_set(tmp_path):
    first = write_run(tmp_path, "a", {}, {"train.micro_batch_size": 4})
    second = write_run(tmp_path, "b", {"train.micro_batch_size": 8})
    found = facts.compare({"a": first, "b": second})
    assert found.differing.set == ["train.micro_batch_size"]
