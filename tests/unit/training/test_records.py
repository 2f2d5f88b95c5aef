"""Rows of metrics.jsonl and facts, as the report reads them again."""

import json

from adder.training.records import TrainingFacts, metrics_rows
from training_stage import training_facts


def test_a_trainers_log_becomes_rows_of_steps_and_evaluations():
    history = [
        {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0, "epoch": 0.5},
        {"step": 1, "eval_loss": 1.5, "eval_runtime": 0.1, "epoch": 0.5},
        {"step": 1, "exact_match": 0.5, "epoch": 0.5},
        {"step": 1, "train_runtime": 3.0, "train_loss": 2.0},
    ]
    assert metrics_rows(history) == [
        history[0],
        {"step": 1, "eval_loss": 1.5, "epoch": 0.5},
        {"step": 1, "exact_match": 0.5, "epoch": 0.5},
    ]


def test_facts_come_back_from_json():
    facts = training_facts(base_loss=2.5, reply_tokens=8.0)
    assert TrainingFacts(**json.loads(json.dumps(facts.to_dict()))) == facts
