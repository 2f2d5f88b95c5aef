"""Sections of the settings: unknown keys are mistakes, a bare `off` is meant as a word."""

from typing import Literal

import pytest
from pydantic import ValidationError

from adder.core.section import Section


class Toy(Section):
    """A section."""

    overlap: Literal["drop", "off"] = "drop"
    """What to do."""
    check: bool = True


def test_off_is_a_word_where_it_is_among_the_values():
    assert Toy.model_validate({"overlap": False}).overlap == "off"
    assert Toy.model_validate({"check": False}).check is False


def test_unknown_keys_are_mistakes():
    with pytest.raises(ValidationError, match="overlapp"):
        Toy.model_validate({"overlapp": "drop"})


def test_help_is_the_text_under_a_setting():
    assert Toy.model_fields["overlap"].description == "What to do."
