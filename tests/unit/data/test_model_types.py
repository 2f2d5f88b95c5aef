"""The settings of a model, and the record that is written of it."""

import pytest
from pydantic import ValidationError

from adder.core.files import read_json
from adder.data.model_types import ModelOrigin, ModelRecord, ModelSettings, ModelSummary
from data_stages import write_model


def test_a_record_has_just_the_keys_that_are_declared(tiny_model_dir, tmp_path):
    record = write_model(tmp_path / "out", tiny_model_dir)
    assert record.keys() == ModelRecord.__required_keys__ and record == read_json(tmp_path / "out" / "source.json")
    assert ModelRecord.__required_keys__ - ModelSummary.__required_keys__ == {"files"}
    assert ModelOrigin.__required_keys__ < ModelSummary.__required_keys__


@pytest.mark.parametrize("settings", [{"source": ""}, {"source": "a/b", "sha256": "0" * 63}, {"source": "a", "x": 1}])
def test_settings_that_are_refused(settings):
    with pytest.raises(ValidationError):
        ModelSettings.model_validate(settings)
