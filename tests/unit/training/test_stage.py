"""What a training may be set to: combinations that make no sense are refused with their reason."""

import pytest
from pydantic import ValidationError

from adder.training.stage import TRAIN, Train, TrainSettings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"init_lora_weights": "loftq", "method": "lora"},
            "loftq makes up for quantisation, so it needs method: qlora",
        ),
        ({"init_lora_weights": "pissa"}, "pissa changes the base's weights, so it needs method: lora"),
        ({"keep": "best", "eval_samples": 0}, "judge by evaluations, so they need eval_samples above 0"),
        ({"best_by": "exact_match", "samples": 0}, "counts sampled replies, so it needs samples above 0"),
        ({"method": "full", "lora_r": 8}, "trains every weight, so lora_r would have no effect; remove it"),
    ],
)
def test_settings_that_contradict_each_other(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        Train.model_validate(settings)


def test_a_full_training_reaches_its_job_with_lora_settings_that_nobody_set():
    """What people may write is checked once; the stage's settings are all there, whatever the method."""
    sent = TrainSettings(method="full", reshuffle=False).model_dump(mode="json")
    assert TrainSettings.model_validate(sent).lora_r == 16


def test_a_killed_training_goes_on_from_a_sealed_checkpoint():
    assert TRAIN.continued == "checkpoint-*/seal.json" and TRAIN.gpu
