"""Why a row isn't trained on, in words."""

import pytest

from adder.formatting.rejected import Rejected, Undesired, json_type


def test_a_reason_has_a_kind_that_is_counted_and_a_detail_that_is_not():
    reason = Rejected("content is empty", "answer")
    assert (reason.kind, str(reason)) == ("content is empty", "content is empty: answer")
    assert Rejected("unreadable row", "line 3", counted_as="broken JSON").kind == "unreadable row: broken JSON"
    assert isinstance(Undesired("undesired"), Rejected)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "nothing"), ("a", "text"), (True, "true or false"), (1, "a number"), (0.5, "a number"), ([], "a list"),
        ({}, "an object"),
    ],
)  # fmt: skip
def test_what_a_value_is(value, words):
    assert json_type(value) == words
