"""The declaration of the stage "lengths"."""

import dataclasses
import json

import pytest

from adder.core.errors import UserError
from adder.packing.run import LengthsInputs
from adder.packing.stage import LENGTHS, Lengths, LengthsSettings


def settings(**choices):
    return LengthsSettings(effective_batch_size=16, max_examples=None, **choices)


def test_what_the_stage_reads_is_what_it_is_given():
    assert {field.name for field in dataclasses.fields(LengthsInputs)} == set(LENGTHS.reads)


def test_every_field_is_in_the_users_section_or_taken_from_another():
    assert set(LengthsSettings.model_fields) <= set(Lengths.model_fields) | set(LENGTHS.takes)


def test_a_length_above_the_models_context_is_refused_before_any_job_runs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    assert LENGTHS.refuse is not None
    LENGTHS.refuse(settings(), tmp_path)
    LENGTHS.refuse(settings(max_seq_length=2048), tmp_path)
    with pytest.raises(UserError, match="4096 is above the model's context, 2048 tokens"):
        LENGTHS.refuse(settings(max_seq_length=4096), tmp_path)


def test_a_model_without_a_context_wants_a_length_set_before_any_job_runs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 64}))
    assert LENGTHS.refuse is not None
    with pytest.raises(UserError, match=r"lengths.max_seq_length: the model's config.json names no context length"):
        LENGTHS.refuse(settings(), tmp_path)
    LENGTHS.refuse(settings(max_seq_length=2048), tmp_path)
