"""Trials in processes of their own: one that dies, hangs or exits ends nothing else."""

import os
from pathlib import Path

import pytest

import kernel_families
from adder.kernels import families
from adder.kernels.trials import process
from adder.kernels.trials.trial import Verdict
from kernel_families import SHAPES
from kernel_families import families as made_up

SOURCE = "kernel_families:families:"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(kernel_families.__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    families.forget()
    yield
    families.forget()


def test_a_child_that_dies_exits_or_raises_costs_its_own_family_alone():
    names = ["killed", "right", "exits", "runtime_error", "wrong"]
    found = process.try_in_children(SOURCE + ",".join(names), names, {}, SHAPES, "cpu", 60.0)
    assert {name: verdict.outcome for name, verdict in found.items()} == {
        "killed": "died",
        "right": "used",
        "exits": "died",
        "runtime_error": "raised",
        "wrong": "wrong",
    }
    assert found["killed"].why == "ended its process: it was killed by signal SIGSEGV"
    assert found["exits"].why == "ended its process: it exited with status 3"


def test_a_child_that_hangs_is_ended():
    names = ["right", "hangs"]
    found = process.try_in_children(SOURCE + ",".join(names), names, {}, SHAPES, "cpu", 15.0)
    assert found["right"].used and found["hangs"].why == "ended its process: it didn't finish within 15 seconds"


def test_a_child_that_cannot_begin_is_said_to_be_none():
    with pytest.raises(process.NoChild, match="it exited with status 1: ModuleNotFoundError"):
        process.try_in_children("no_such_module:families:", ["right"], {}, SHAPES, "cpu", 60.0)


def test_what_stands_after_another_is_tried_only_where_that_cannot_be_used():
    found = process.try_one_by_one(made_up("right,wrong<right,no_number<wrong"), {}, SHAPES, "cpu")
    assert [verdict.outcome for verdict in found.values()] == ["used", "unneeded", "unneeded"]
    found = process.try_one_by_one(made_up("wrong,right<wrong,no_number<right"), {}, SHAPES, "cpu")
    assert [verdict.outcome for verdict in found.values()] == ["wrong", "used", "unneeded"]
    assert families.why_off("wrong") and families.is_tried("right") and families.why_off("right") is None


def test_families_that_are_known_are_not_tried_again():
    known = {"wrong": Verdict("wrong", "used")}
    found = process.try_one_by_one(made_up("wrong,right"), known, SHAPES, "cpu")
    assert list(found) == ["right"] and families.is_tried("wrong")
