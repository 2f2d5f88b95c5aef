"""What the evaluations of a training say: the best step, and for how long none was better."""

from adder.training.evaluation_history import best_step, evaluations_since_best


def test_the_best_evaluation_is_the_earliest_of_equals():
    history = [{"step": step, "eval_loss": loss} for step, loss in ((10, 0.5), (20, 0.3), (30, 0.3), (40, 0.4))]
    history += [{"step": 20, "exact_match": 0.2}, {"step": 40, "exact_match": 0.6}, {"step": 41, "loss": 0.01}]
    assert best_step(history, "loss") == 20 and evaluations_since_best(history, "loss") == 2
    assert best_step(history, "exact_match") == 40 and best_step([], "loss") is None
    assert evaluations_since_best([], "loss") == 0
