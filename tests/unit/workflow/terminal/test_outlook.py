"""What is left of a run, as it goes."""

from pathlib import Path

import pytest

from adder.core.display.status import StageStatus
from adder.workflow.stage_graph import Stage
from adder.workflow.stages import SPECS
from adder.workflow.terminal.estimates import AROUND, Times
from adder.workflow.terminal.outlook import Outlook
from adder.workflow.terminal.plan import Plan, PlannedStage

SETTINGS = {"train": {"epochs": 1}, "evaluate": {"max_samples": None}, "report": {}}


@pytest.fixture
def outlook(tmp_path: Path) -> Outlook:
    """Training and report, of which nothing is known from earlier runs."""
    stages = {
        name: PlannedStage(spec, Stage(spec, spec.settings.model_construct(), {}), name, ("default",))
        for name, spec in SPECS.items()
        if name in ("train", "report")
    }
    plan = Plan(tmp_path, ("default",), stages, jobs=list(stages))
    return Outlook(plan, Times(), settings={name: SETTINGS[name] for name in stages})


def test_nothing_is_known_until_the_work_is_counted_and_the_machine_has_shown_its_pace(outlook, monkeypatch):
    outlook.times.has_computed = True
    assert not outlook.left({}, 1000.0).is_known, "of the training, nobody knows the tokens"
    monkeypatch.setattr("adder.workflow.terminal.outlook.is_counted", lambda *known: True)
    assert outlook.left({}, 1000.0).is_known
    outlook.times.has_computed = False
    assert not outlook.left({}, 1000.0).is_known
    assert outlook.left({"train": StageStatus(1000.0, left=300.0, at=1000.0)}, 1000.0).is_known


def test_it_gets_less_as_stages_run_and_finish(outlook):
    whole = outlook.left({}, 1000.0)
    running = outlook.left({"train": StageStatus(began=1000.0)}, 1010.0)
    assert running.seconds == pytest.approx(whole.seconds - 10) and not whole.is_learnt
    waiting = outlook.left({"train": StageStatus()}, 1010.0)
    assert waiting.seconds == pytest.approx(whole.seconds), "a job in a cluster's queue has done nothing yet"
    outlook.finished("train")
    assert outlook.left({}, 1020.0).seconds < AROUND + 5


def test_a_stage_that_can_tell_is_believed_and_its_word_ages(outlook):
    told = {"train": StageStatus(1000.0, left=300.0, at=1050.0)}
    early, late = outlook.left(told, 1050.0), outlook.left(told, 1150.0)
    assert early.seconds - late.seconds == pytest.approx(100) and early.is_learnt


def test_a_stage_that_takes_longer_than_thought_is_never_over_before_it_is(outlook):
    assert outlook.left({"train": StageStatus(began=1000.0)}, 9000.0).seconds > 100
