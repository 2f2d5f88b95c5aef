"""Signs in the curves, by made-up rows; test_doctor.py causes each of them in a real training."""

import math

import numpy as np

from adder.evaluation.degenerate_replies import ReplyFaults
from adder.training.monitoring import symptoms
from adder.training.monitoring.symptoms import Curves, Replies
from adder.training.records import MetricsRow, SampleRow
from training_stage import train_settings, training_facts

FACTS, SETTINGS = training_facts(steps=60), train_settings()


def curve(losses: list[float], norms: list[float] | None = None) -> list[MetricsRow]:
    steps = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [
        MetricsRow(step=number + 1, epoch=(number + 1) / len(losses), loss=loss, grad_norm=norm)
        for number, (loss, norm) in enumerate(steps)
    ]


def falling(count: int = 60) -> list[float]:
    return [3 * math.exp(-number / 20) + 0.5 for number in range(count)]


def test_curves_hold_the_finite_steps_and_the_evaluations():
    rows = [
        MetricsRow(step=1, epoch=0.5, loss=2.0, grad_norm=math.nan),
        MetricsRow(step=2, epoch=1.0, loss=math.nan, grad_norm=1.0, skipped_step=1),
        MetricsRow(step=3, loss=1.0),
        MetricsRow(step=3, epoch=1.5, eval_loss=1.25),
        MetricsRow(step=3, exact_match=0.5),
    ]
    found = Curves.of(rows)
    assert found.steps.tolist() == [1, 3] and found.losses.tolist() == [2.0, 1.0]
    assert np.isinf(found.norms[0]) and np.isnan(found.norms[1]) and np.isnan(found.epochs[1])
    assert [tuple(one) for one in found.evals] == [(3, 1.5, 1.25, None)] and found.skipped == 1
    assert Curves.of([]).last_step == 0


def test_replies_of_a_step_in_figures():
    rows = [
        SampleRow(step=4, id=str(i), prompt="p", reference="r", reply=reply, exact_match=right, finished=ended)
        for i, (reply, right, ended) in enumerate([("r", 1, True), ("", 0, True), ("x", 0, False), ("y", 0, False)])
    ]
    faults = ReplyFaults(replies=4, unended=2, empty=1, circling=0, alike=0, echoing=0, faulty=3)
    assert Replies.of(rows, 12.0) == Replies(4, 0.25, faults, 12.0)
    assert Replies.of([], 12.0) is None


def test_a_falling_loss_shows_no_sign():
    curves = Curves.of(curve(falling()))
    checks = (symptoms.diverging, symptoms.exploding, symptoms.vanishing, symptoms.flat, symptoms.spikes)
    assert [check(curves, FACTS, SETTINGS) for check in checks] == [None] * len(checks)


def test_a_loss_that_climbs_diverges():
    found = symptoms.diverging(Curves.of(curve([3 + number / 5 for number in range(60)])), FACTS, SETTINGS)
    assert found is not None and found["name"] == "loss diverges" and "train.learning_rate" in found["change"]


def test_gradients_that_grow_while_nothing_is_learnt_explode():
    norms = [1.0] * 10 + [200.0] * 50
    found = symptoms.exploding(Curves.of(curve([3.0] * 60, norms)), FACTS, SETTINGS)
    assert found is not None and found["name"] == "gradient explodes"
    assert symptoms.exploding(Curves.of(curve(falling(), norms)), FACTS, SETTINGS) is None


def test_a_held_out_loss_that_rises_while_training_goes_on_is_overfitting():
    rows = curve(falling())
    rows += [MetricsRow(step=20, epoch=0.33, eval_loss=1.0), MetricsRow(step=60, epoch=1.0, eval_loss=1.3)]
    found = symptoms.overfitting(Curves.of(rows), FACTS, SETTINGS)
    assert found is not None and (found["severity"], found["step"]) == ("warning", 20)
    kept = symptoms.overfitting(Curves.of(rows), FACTS, train_settings(keep="best"))
    assert kept is not None and kept["severity"] == "note"
