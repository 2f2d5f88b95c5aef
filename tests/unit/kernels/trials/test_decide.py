"""What is decided of kernels holds for the process, is said, recorded and kept."""

import os
from pathlib import Path

import pytest
import torch

import kernel_families
from adder.core.progress import Progress
from adder.kernels import families, rmsnorm, triton_utils
from adder.kernels.trials import decide, kept, process
from adder.kernels.trials.trial import Verdict
from kernel_families import SHAPES

SOURCE = "kernel_families:families:"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(kernel_families.__file__).parent) + os.pathsep + os.environ.get("PYTHONPATH", "")
    )
    families.forget()
    yield
    families.forget()


def decided(names, folder, said):
    progress = Progress.silent()
    progress.say = progress.note = said.append
    return decide.decide(names, SHAPES, "cpu", folder, progress, 60.0, SOURCE)


def test_what_fails_is_not_used_is_said_in_a_sentence_each_and_never_tried_again(tmp_path, monkeypatch):
    said: list[str] = []
    choice = decided("right,killed,out_of_resources", tmp_path, said)
    assert choice.value == "right" and families.is_tried("right") and not families.why_off("right")
    assert families.why_off("killed") and families.why_off("out_of_resources")
    assert said[0] == "trying 3 families of kernels on this card, once for this model's sizes"
    assert said[1:] == [
        "what is killed: the kernels of killed aren't used, plain torch instead: a trial ended its process: it was "
        "killed by signal SIGSEGV",
        "what is out_of_resources: the kernels of out_of_resources aren't used, plain torch instead: a trial failed: "
        "OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: 101376",
    ]
    assert choice.reason == "; ".join(said[1:])
    assert [(row["family"], row["used"]) for row in choice.alternatives] == [
        ("right", True),
        ("killed", False),
        ("out_of_resources", False),
    ]
    monkeypatch.setattr(process, "try_in_children", None)  # which nothing may call now
    again: list[str] = []
    assert decided("right,killed,out_of_resources", tmp_path, again) == choice and again == said[1:]


def test_where_all_are_right_nothing_but_the_trial_is_said(tmp_path):
    said: list[str] = []
    choice = decided("right", tmp_path, said)
    assert choice.reason == "each was tried on this card with the model's sizes, is right and pays" and len(said) == 1


def test_where_no_child_can_use_the_card_this_process_tries(tmp_path, monkeypatch):
    def none(*_):
        raise process.NoChild("it exited with status 1: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(process, "try_in_children", none)
    said: list[str] = []
    choice = decided("right,wrong", tmp_path, said)
    assert choice.value == "right" and "CUDA-capable device(s) is/are busy" in said[1] and "was off by" in said[2]


def test_a_preferred_one_that_is_kept_spares_the_others_a_trial(tmp_path, monkeypatch):
    decided("right", tmp_path, [])
    monkeypatch.setattr(process, "try_in_children", None)
    choice = decided("right,wrong<right,slow<wrong", tmp_path, [])
    assert [row["outcome"] for row in choice.alternatives] == ["used", "unneeded", "unneeded"]


def test_what_had_no_memory_is_asked_again(tmp_path, monkeypatch):
    said: list[str] = []
    assert decided("no_memory", tmp_path, said).value == "none" and "not enough free memory" in said[1]
    found = {"no_memory": Verdict("no_memory", "used")}
    monkeypatch.setattr(process, "try_in_children", lambda *_: found)
    assert decided("no_memory", tmp_path, []).value == "no_memory"


def test_a_family_that_is_switched_off_leaves_its_work_to_the_reference(monkeypatch):
    """By a kernel that would raise, were it called."""

    class Broken:
        def __getitem__(self, grid):
            raise kernel_families.OutOfResources("shared memory")

    monkeypatch.setattr(triton_utils, "INTERPRETED", True)
    monkeypatch.setattr(rmsnorm, "_rms_norm", Broken())
    x, weight = torch.randn(3, 8), torch.randn(8)
    found, expected = torch.empty(3, 8), torch.empty(3, 8)
    with pytest.raises(kernel_families.OutOfResources):
        rmsnorm.rms_norm_into(x, weight, 1e-6, False, found)
    process.apply([Verdict("rmsnorm", "raised", "failed: OutOfResources")])
    rmsnorm.rms_norm_into(x, weight, 1e-6, False, found)
    rmsnorm.rms_norm_into_reference(x, weight, 1e-6, False, expected)
    assert torch.equal(found, expected)


def test_the_declared_families_are_found_by_name():
    for purpose, first in (("lora", "adder_triton"), ("full", "adder_triton"), ("inference", "rmsnorm")):
        assert process.find(decide.DECLARED + purpose)[0].name == first
    assert kept.code_digest() == kept.code_digest()
