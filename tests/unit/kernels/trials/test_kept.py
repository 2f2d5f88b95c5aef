"""Verdicts are found again by the same machine for the same sizes, and by no other."""

from dataclasses import replace

import pytest

from adder.core.machine import graphics_cards
from adder.kernels.trials import kept
from adder.kernels.trials.trial import Verdict
from kernel_families import SHAPES, families


@pytest.fixture
def declared():
    made = families("right,wrong,no_memory")
    return [made[0], replace(made[1], with_lora=True), made[2]]


def test_verdicts_that_last_are_kept(tmp_path, declared):
    machine = kept.this_machine("cpu")
    verdicts = {
        "right": Verdict("right", "used", error=0.001, tolerance=0.01),
        "wrong": Verdict("wrong", "wrong", "was off by 0.5"),
        "no_memory": Verdict("no_memory", "no memory", "no room"),
    }
    kept.save(tmp_path / "new", declared, verdicts, machine, SHAPES)
    found = kept.load(tmp_path / "new", declared, machine, SHAPES)
    assert found == {name: verdicts[name] for name in ("right", "wrong")}


@pytest.mark.parametrize("changed", ["card", "driver", "libraries", "code", "capability", "cuda"])
def test_another_machine_asks_again(tmp_path, declared, changed):
    machine = kept.this_machine("cpu")
    kept.save(tmp_path, declared, {"right": Verdict("right", "used")}, machine, SHAPES)
    assert kept.load(tmp_path, declared, {**machine, changed: "another"}, SHAPES) == {}


def test_other_sizes_ask_again_and_loras_only_where_they_matter(tmp_path, declared):
    machine = kept.this_machine("cpu")
    both = {"right": Verdict("right", "used"), "wrong": Verdict("wrong", "used")}
    kept.save(tmp_path, declared, both, machine, SHAPES)
    assert kept.load(tmp_path, declared, machine, replace(SHAPES, hidden=128)) == {}
    assert list(kept.load(tmp_path, declared, machine, replace(SHAPES, rank=64))) == ["right"]


def test_a_damaged_file_and_a_folder_that_cannot_be_written_to_are_as_none(tmp_path, declared):
    machine = kept.this_machine("cpu")
    kept.path(tmp_path, declared[0], machine, SHAPES).write_text('{"verdict": {"fam')
    assert kept.load(tmp_path, declared, machine, SHAPES) == {}
    (tmp_path / "file").write_text("")
    kept.save(tmp_path / "file" / "folder", declared, {"right": Verdict("right", "used")}, machine, SHAPES)


def test_a_machine_is_described_by_all_that_can_change_an_answer(monkeypatch):
    monkeypatch.setattr(graphics_cards, "driver_version", lambda: "550.54.15")
    found = kept.this_machine("cpu")
    assert found["driver"] == "550.54.15" and found["libraries"]["torch"] and len(found["code"]) == 64


def test_what_is_kept_is_told_by_card(tmp_path, declared):
    machine = kept.this_machine("cpu")
    verdicts = {"right": Verdict("right", "used"), "wrong": Verdict("wrong", "wrong", "was off by 0.5")}
    kept.save(tmp_path, declared, verdicts, machine, SHAPES)
    (tmp_path / "other.json").write_text("{}")
    assert sorted(kept.told(tmp_path, "CPU")) == [
        "right (hidden size 64, float32): is used",
        "wrong (hidden size 64, float32): isn't used: a trial was off by 0.5",
    ]
    assert kept.told(tmp_path, "another card") == [] == kept.told(tmp_path / "none", "CPU")
