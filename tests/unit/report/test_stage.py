"""What the report is told: a price that isn't negative, and of every stage what it shows."""

import pytest
from pydantic import ValidationError

from adder.report.stage import REPORT, Report, spoken
from report_fixture import write_stage_folders


def test_a_price_below_nothing_is_refused():
    assert Report(price_per_hour=0).price_per_hour == 0
    with pytest.raises(ValidationError):
        Report(price_per_hour=-1)


def test_settings_survive_being_written_and_read(tmp_path):
    settings, inputs = write_stage_folders(tmp_path, heldout=3)
    assert REPORT.settings.model_validate(settings.model_dump(mode="json")) == settings
    assert settings.shows.keys() == inputs.keys()
    assert settings.shows["train"]["curve"] == "metrics.jsonl"


def test_the_smallest_difference_that_matters_is_set_by_score():
    known = Report().smallest_difference
    assert Report(smallest_difference={"loss": 0.5}).smallest_difference == known | {"loss": 0.5}
    for wrong in ({"lose": 0.5}, {"loss": -1}):
        with pytest.raises(ValidationError):
            Report(smallest_difference=wrong)


def test_a_better_with_doubts_is_not_said_alone():
    verdict = {"verdict": "better", "doubts": []}
    assert spoken(verdict) == "better"
    assert spoken(verdict | {"doubts": ["the doctor warns of overfitting"]}) == "better, to be read with care"
