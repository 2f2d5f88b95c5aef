"""Replies to held-out prompts while training."""

import pytest

from adder.core.files import read_jsonl
from tiny import write_training_inputs
from training_stage import train_small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


def test_sampled_replies_stand_beside_the_bases_and_the_reference(inputs, tmp_path):
    summary = train_small(inputs, tmp_path / "out", samples=3, eval_times=2)
    rows = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    steps = {row["step"] for row in rows}
    assert 0 in steps and summary["steps"] in steps and len(steps) == 3
    for step in steps:
        assert len({row["id"] for row in rows if row["step"] == step}) == 3
    assert all(row["prompt"] and row["reference"] and row["exact_match"] in (0, 1) for row in rows)
    curves = list(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    assert [row["step"] for row in curves if "exact_match" in row] == sorted(steps - {0})
