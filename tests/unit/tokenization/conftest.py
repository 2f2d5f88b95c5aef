"""Fixtures of the tests of chat templates."""

import pytest

from adder.tokenization.chat_template import DATE
from adder.tokenization.labels import Labeller
from chat_families import FAMILIES


@pytest.fixture(scope="module", autouse=True)
def stopped_clock():
    """Let apply_chat_template write the date that the stage writes."""

    class Clock:
        now = staticmethod(lambda: DATE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        yield


@pytest.fixture(scope="session")
def labellers() -> dict[str, Labeller]:
    """One labeller a family."""
    return {name: Labeller(family.tokenizer()) for name, family in FAMILIES.items()}
