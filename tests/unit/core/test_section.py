"""Sections of the settings: unknown keys are mistakes, a bare `off` is meant as a word, a number is one."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from adder.core.section import Auto, Section


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


class Numbers(Section):
    """A section of numbers."""

    plain: int = 1
    maybe: float | None = None
    auto: Auto | Annotated[int, Field(ge=1)] = "auto"
    several: list[float] = Field(default_factory=list)
    either: Auto | bool = "auto"


@pytest.mark.parametrize("name", ["plain", "maybe", "auto", "several"])
@pytest.mark.parametrize("value", [True, False, float("inf"), float("-inf"), float("nan")])
def test_what_is_no_finite_number_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        Numbers.model_validate({name: [value] if name == "several" else value})


def test_true_stays_true_where_that_is_meant():
    assert Numbers.model_validate({"either": True}).either is True
    assert Numbers.model_validate({"maybe": 2, "several": [1]}).several == [1.0]
