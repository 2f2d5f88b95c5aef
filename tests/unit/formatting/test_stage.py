"""The declaration of the stage "format"."""

import dataclasses

from adder.data.stage import Heldout
from adder.formatting.run import FormatInputs
from adder.formatting.stage import FORMAT, Format, FormatSettings


def test_what_the_stage_reads_is_what_it_is_given():
    assert {field.name for field in dataclasses.fields(FormatInputs)} == set(FORMAT.reads)


def test_every_field_is_in_the_users_section_or_taken_from_another():
    assert set(FormatSettings.model_fields) == set(Format.model_fields) | set(FORMAT.takes)
    assert set(FORMAT.takes) == set(Heldout.model_fields) - {"sources"}
