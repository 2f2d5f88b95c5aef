"""A family that raises, is wrong or is slow isn't used, and its verdict says so."""

import pytest
import torch

from adder.kernels.trials import declared
from adder.kernels.trials.trial import Case, KernelFamily, relative_error, try_family
from adder.kernels.triton_utils import INTERPRETED
from kernel_families import SHAPES, families, family, said_to_be

ON_THE_CPU = [name for name in declared.FAMILIES if not name.startswith("adder_")]


@pytest.mark.parametrize(
    ("name", "outcome", "words"),
    [
        ("right", "used", ""),
        ("out_of_resources", "raised", "failed: OutOfResources: out of resource: shared memory, Required: 147456"),
        ("compilation_error", "raised", "failed: CompilationError: at 7:4"),
        ("runtime_error", "raised", "CUBLAS_STATUS_NOT_SUPPORTED"),
        ("other_shape", "raised", "it gave (4, 4) where (4,) is right"),
        ("no_memory", "no memory", "not enough free memory"),
        ("wrong", "wrong", "was off by 0.5 (a case; 0.01 is allowed: made up)"),
        ("no_number", "wrong", "gave what is no number"),
        ("slow", "slow", "ms where plain torch took"),
    ],
)
def test_what_is_found_of_a_family_is_said(name, outcome, words):
    verdict = try_family(family(name), SHAPES, "cpu")
    assert (verdict.family, verdict.outcome) == (name, outcome) and words in verdict.why
    assert verdict.used is (outcome == "used") and verdict.lasting is (outcome != "no memory")


def test_what_a_machine_lacks_is_not_tried():
    def never(*_):
        raise AssertionError

    made = KernelFamily("a", "a", "b", 0.1, "", never, lambda shapes: "Triton is not installed")
    verdict = try_family(made, SHAPES, "cpu")
    assert (verdict.outcome, verdict.why, verdict.lasting) == ("lacking", "Triton is not installed", False)


def test_a_card_that_cannot_even_be_asked_is_a_reason():
    def unknown(shapes):
        raise RuntimeError("No CUDA GPUs are available")

    verdict = try_family(KernelFamily("a", "a", "b", 0.1, "", lambda *_: [], unknown), SHAPES, "cpu")
    assert (verdict.outcome, verdict.why) == ("lacking", "RuntimeError: No CUDA GPUs are available")


def test_one_wrong_number_among_many_is_seen():
    expected = torch.ones(1000)
    for spoiled in (torch.nan, torch.inf, 5.0):
        found = expected.clone()
        found[3] = spoiled
        assert not relative_error([found], [expected]) <= 0.05
    assert relative_error([expected, expected], [expected, expected]) == 0


def test_a_case_may_be_held_to_another_tolerance():
    close = Case("close", lambda: [torch.ones(4) * 1.1], lambda: [torch.ones(4)], timed=False)
    made = KernelFamily("a", "a", "b", 0.01, "", lambda *_: [close._replace(tolerance=0.2)])
    assert try_family(made, SHAPES, "cpu").used
    assert not try_family(KernelFamily("a", "a", "b", 0.01, "", lambda *_: [close]), SHAPES, "cpu").used


@pytest.mark.parametrize("kind", ["out_of_resources", "compilation_error", "runtime_error", "wrong", "no_number"])
def test_each_declared_family_is_given_up_where_its_kernels_fail(kind):
    for one in said_to_be(kind):
        verdict = try_family(one, SHAPES, "cpu")
        assert not verdict.used and verdict.family == one.name and verdict.why


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_each_declared_familys_references_agree_with_what_runs_without_a_gpu(name, monkeypatch):
    """The cases themselves: their shapes fit, references and what is used in their place compute the same.

    With TRITON_INTERPRET=1 these are the kernels themselves.
    """
    if INTERPRETED and name == "fp8":
        pytest.skip("Triton's interpreter halves some values that it should round up to a power of two")
    monkeypatch.setattr(declared, "ROWS", 40)
    monkeypatch.setattr(declared, "MANY", 40)
    monkeypatch.setattr(declared, "FEW", 24)
    for case in declared.FAMILIES[name].cases(SHAPES, "cpu"):
        error = relative_error(case.kernel(), case.reference())
        assert error <= (case.tolerance or 2e-3), (case.name, error)
        if case.tolerance is not None:
            assert error > 0.02  # fp8 is off by something


def test_fakes_are_made_by_name():
    assert [(one.name, one.after) for one in families("right,wrong<right")] == [("right", None), ("wrong", "right")]
