"""Times of stages by those of earlier ones."""

import pytest

from adder.core.stage_record import StageRecord
from adder.workflow.terminal.estimates import MEASURED, Times, is_counted, kind, machine_of, together, units

HERE, ELSEWHERE = {"cpu": "A", "cores": 2}, {"cpu": "B", "cores": 64}
TOKENS = {"train": {"examples": 60, "tokens": 1000}, "heldout": {"examples": 20, "tokens": 400}}


def record(stage, seconds, summary, inputs=None, settings=None, hardware=HERE, name="x", **more) -> StageRecord:
    """A finished stage, which wrote one file of this name."""
    made = {
        "stage": stage,
        "seconds": seconds,
        "summary": summary,
        "settings": settings or {},
        "inputs": inputs or {},
        "outputs": {"out": {"digest": f"{stage}-{name}", "bytes": 1, "mtime_ns": 1}},
        "hardware": hardware,
        "fingerprint": f"{stage}-{name}-{seconds}",
        "restored": False,
    }
    return made | more  # pyright: ignore[reportReturnType] - as much of a record as is read


def earlier(machine=HERE, seconds=130.0) -> Times:
    """What a run on that machine left."""
    times = Times(machine_of(record("x", 1, {}, hardware=HERE)))
    model = {"model": {"out": "model-x"}}
    times.add(record("model", 9, {"parameters": 10**9}, hardware=machine))
    times.add(record("tokenize", 9, {"counts": TOKENS}, model, hardware=machine))
    read = model | {"tokenize": {"out": "tokenize-x"}}
    times.add(record("train", seconds, {}, read, {"epochs": 1}, machine))
    times.add(record("evaluate", 40, {}, read, {"max_samples": None}, machine, "base"))
    merged = {"model": {"out": "merge-x"}, "tokenize": {"out": "tokenize-x"}}
    times.add(record("merge", 9, {}, {"train": {"out": "train-x"}} | model, hardware=machine))
    times.add(record("evaluate", 20, {}, merged, {"max_samples": None}, machine, "tuned"))
    return times


ABOVE = {"model": {"parameters": 10**9}, "tokenize": {"counts": TOKENS}}


def test_twice_the_tokens_take_twice_the_time_beyond_what_starting_takes():
    beside = MEASURED["train"][1]
    assert earlier().estimate("train", {"epochs": 1}, ABOVE) == (130.0, True)
    assert earlier().estimate("train", {"epochs": 2}, ABOVE) == (beside + 2 * (130 - beside), True)


def test_a_tuned_model_is_expected_to_take_what_a_tuned_one_took():
    wanted = {"max_samples": None}
    assert earlier().estimate("evaluate", wanted, ABOVE)[0] == 40
    assert earlier().estimate("evaluate", wanted, ABOVE, names=["merge"])[0] == 20


def test_the_latest_counts_and_another_machine_does_not():
    times = earlier()
    again = {"model": {"out": "model-x"}, "tokenize": {"out": "tokenize-x"}}
    times.add(record("train", 230.0, {}, again, {"epochs": 1}, name="later"))
    assert times.estimate("train", {"epochs": 1}, ABOVE) == (230.0, True)
    elsewhere = earlier(ELSEWHERE)
    seconds, is_learnt = elsewhere.estimate("train", {"epochs": 1}, ABOVE)
    assert not is_learnt and seconds == pytest.approx(MEASURED["train"][1] + MEASURED["train"][0] * 1000 * 1e9)
    elsewhere.machine = None
    assert elsewhere.estimate("train", {"epochs": 1}, ABOVE) == (130.0, True)


def test_what_this_run_has_shown_of_a_machine_is_expected_of_its_other_stages():
    times = Times(("C", 1))
    for known in earlier(ELSEWHERE).records:
        times.add(known)
    before = times.estimate("train", {"epochs": 1}, ABOVE)[0]
    read = {"model": {"out": "model-x"}, "tokenize": {"out": "tokenize-x"}}
    base = MEASURED["evaluate"][1] + MEASURED["evaluate"][0] * 400 * 1e9
    times.note(record("evaluate", 3 * base, {}, read, {"max_samples": None}, ELSEWHERE, "slow"))
    assert times.estimate("train", {"epochs": 1}, ABOVE)[0] == pytest.approx(3 * before)
    isolation = record("isolation", 40 * MEASURED["isolation"][1], {}, read, hardware=ELSEWHERE)
    quick = record("evaluate", 0.1, {}, read, {"max_samples": None}, ELSEWHERE, "kept", restored=True)
    times.note(quick)
    assert times.estimate("train", {"epochs": 1}, ABOVE)[0] == pytest.approx(3 * before)
    on_gpu = ELSEWHERE | {"gpu": ["NVIDIA H200"]}
    times.note(record("isolation", 40 * MEASURED["isolation"][1], {}, read, hardware=on_gpu, name="on a GPU"))
    assert times.estimate("train", {"epochs": 1}, ABOVE)[0] == pytest.approx(3 * before)
    times.note(isolation)
    assert times.estimate("train", {"epochs": 1}, ABOVE)[0] > 3 * before


@pytest.mark.parametrize("stage", ["format", "train", "evaluate", "merge", "report", "own stage"])
def test_what_cannot_be_counted_yet_is_none(stage):
    assert units(stage, {}, {}) is None
    assert Times().estimate(stage, {}, {})[0] > 0
    assert is_counted(stage, {}, {}) is (stage in ("format", "report", "own stage"))


def test_a_training_is_counted_once_its_tokens_are():
    assert is_counted("train", {"epochs": 1}, ABOVE) and not is_counted("train", {"epochs": 1}, {"data": {"rows": 9}})


def test_kinds():
    assert kind("evaluate", ["model"]) == "evaluate" and kind("evaluate", ["merge"]) == "evaluate merge"


def test_stages_one_after_the_other_and_at_once():
    left = {"a": 10.0, "b": 20.0, "c": 5.0}
    parents = {"c": ["b"], "b": [], "a": []}
    assert together(left, parents, 1) == 35
    assert together(left, parents, 8) == 25
    assert together(left, parents, 2) == 25 and together({}, {}, 2) == 0


def test_of_a_training_only_the_steps_grow_with_the_tokens():
    times = earlier()
    read = {"model": {"out": "model-x"}, "tokenize": {"out": "tokenize-x"}}
    times.add(record("train", 70.0, {"tokens_per_second": 100.0}, read, {"epochs": 1}, name="fast"))
    assert times.estimate("train", {"epochs": 1}, ABOVE) == (70.0, True)
    assert times.estimate("train", {"epochs": 6}, ABOVE) == (60 + 6 * 10, True)
