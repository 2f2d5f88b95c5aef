"""Replies to held-out prompts while training."""

import pytest

import family_templates
from adder.core.files import read_jsonl
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.tokenization.labels import Labeller
from adder.training import sampled_replies
from adder.training.sampled_replies import (
    CPU_STEP_TOKENS,
    SHARE,
    SHORTEST,
    Prompt,
    Sampler,
    SampleTimes,
    cpu_sample_times,
)
from conversation_cases import reply, user
from template_matrix import tokenizer_for, trl_templates
from tiny import tiny_tokenizer, write_training_inputs
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


def sampler(tmp_path, allowance):
    prompts = [Prompt("rows:1", [5, 6], list(range(200)))]
    tokenizer = tiny_tokenizer()
    return Sampler(prompts, tokenizer, "float32", tmp_path / "samples.jsonl", 0, Progress.silent(), allowance)


@pytest.mark.parametrize("family", ["Qwen3", "Magistral", "gpt-oss"])
def test_a_reply_differs_from_its_reference_by_its_answer_not_by_its_reasoning(tmp_path, monkeypatch, family):
    shipped = family_templates.SHIPPED
    template = trl_templates()[shipped[family]].read_text() if family in shipped else family_templates.OWN[family]
    tokenizer = tokenizer_for(template)
    learnt = []
    for reasoning in ("Add.", "Two twos."):
        turns = [user("2 + 2?"), reply("It is 4.", reasoning_content=reasoning)]
        (found,) = Labeller(tokenizer).label([{"messages": turns}])[0]
        learnt.append(found.ids[found.labels != IGNORE_INDEX].tolist())
    file = tmp_path / "samples.jsonl"
    own = Sampler([Prompt("rows:1", [5, 6], learnt[0])], tokenizer, "float32", file, 0, Progress.silent())
    monkeypatch.setattr(own, "_generate", lambda model: [learnt[1]])
    assert own.sample(None, 0) == 1.0
    assert "Add." in own.rows[0]["reference"] and "Two twos." in own.rows[0]["reply"]
    assert own.rows[0]["reply"].endswith("It is 4.")


def test_samples_take_no_more_than_their_share_of_a_training(tmp_path, monkeypatch):
    assert sampler(tmp_path, None).limit == 208 and sampler(tmp_path, 60.0).limit == 208
    assert sampler(tmp_path, 3.0).limit == 50 and sampler(tmp_path, 0.1).limit == SHORTEST
    own = sampler(tmp_path, 3.0)
    clock = iter(range(0, 100))  # each look at the clock is a second after the one before
    monkeypatch.setattr(sampled_replies.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(own, "_generate", lambda model: [[5, 6]])
    taken = [own.sample(None, step, last=step == 40) is not None for step in (0, 10, 20, 30, 40)]
    assert taken == [True, True, False, False, True] and own.spent == 3.0
    unlimited = sampler(tmp_path / "other", None)
    monkeypatch.setattr(unlimited, "_generate", lambda model: [[5, 6]])
    assert all(unlimited.sample(None, step) is not None for step in (0, 10, 20, 30))


def test_on_a_cpu_samples_are_fewer_where_they_would_take_more_than_their_share():
    assert cpu_sample_times(2_000, 60, 10, 2) is None  # over in seconds
    for tokens in (60_000, 150_000, 10_000_000):
        times = cpu_sample_times(tokens, 60, 100, 20)
        taken = [step for step in range(0, 101, 20) if times.has(step)]
        assert taken[0] == 0 and taken[-1] == 100
        assert len(taken) == 2 or len(taken) * 60 * CPU_STEP_TOKENS <= SHARE * tokens
    assert taken == [0, 20, 40, 60, 80, 100]
    uneven = SampleTimes(4, 103, 21)
    assert sum(uneven.has(step) for step in (0, 21, 42, 63, 84, 103)) == 4
