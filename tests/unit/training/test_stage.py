"""What a training may be set to: combinations that make no sense are refused with their reason."""

import pytest
from pydantic import ValidationError

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import write_json
from adder.training.stage import TRAIN, Train, TrainSettings, refuse_mismatch


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


OWN = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"], "modules_to_save": None}


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({"r": 8}, {}, "train.lora_r is 16, and own has 8"),
        ({"lora_alpha": 16}, {}, "train.lora_alpha is 32, and own has 16"),
        ({"use_dora": True}, {}, "train.use_dora is false, and own has true"),
        ({"use_rslora": True}, {}, "train.use_rslora is false, and own has true"),
        ({}, {"target_modules": ["q_proj"]}, r"train.target_modules is \[q_proj\], and own has \[q_proj, v_proj\]"),
        ({"modules_to_save": ["lm_head"]}, {}, r"train.modules_to_save is \[\], and own has \[lm_head\]"),
        ({}, {"init_lora_weights": "gaussian"}, "train.init_lora_weights has no effect"),
        ({"peft_type": "IA3"}, {}, "of the kind IA3, and only LoRA"),
        ({"trainable_token_indices": [3]}, {}, "trainable_token_indices, which can't be gone on from"),
        ({"bias": "all"}, {}, "has bias, which"),
    ],
)
def test_an_adapter_to_go_on_from_must_be_what_the_settings_say(tmp_path, changes, settings, sentence):
    """Before any job, where it is in a folder."""
    (tmp_path / "own").mkdir()
    write_json(tmp_path / "own" / "adapter_config.json", OWN | changes)
    (tmp_path / "own" / "adapter_model.safetensors").touch()
    own = TrainSettings(reshuffle=False, adapter="own", **settings)
    assert TRAIN.identity is not None
    with pytest.raises(UserError, match=f"^model.adapter: .*{sentence}") as told:
        TRAIN.identity(own, "train", FileDigests(tmp_path / "digests.json", tmp_path))
    assert len(str(told.value).splitlines()) == 1


def test_all_differences_are_told_at_once_and_none_where_there_is_none(tmp_path):
    own = TrainSettings(reshuffle=False, lora_r=4, lora_alpha=8)
    with pytest.raises(UserError) as told:
        refuse_mismatch(OWN, own, "own")
    assert len(str(told.value).splitlines()) == 2
    refuse_mismatch(OWN, TrainSettings(reshuffle=False), "own")
    refuse_mismatch(OWN | {"r": 3}, TrainSettings(reshuffle=False, method="full"), "own")


def test_where_the_adapter_is_named_is_no_part_of_the_key(tmp_path):
    """The stage "model" has its content."""
    digests = FileDigests(tmp_path / "digests.json", tmp_path)
    assert TRAIN.identity is not None
    keys = [TRAIN.identity(TrainSettings(reshuffle=False, adapter=name), "train", digests) for name in (None, "o/a")]
    assert keys[0] == keys[1]
