"""Texts of messages and where they stand."""

import json

import pytest

from adder.tokenization.message_texts import (
    common_prefix,
    is_written,
    joined,
    reasoning_and_answer,
    strings,
    unused_marker,
    with_content,
)
from conversation_cases import reply


@pytest.mark.parametrize("text", ['say "it"', "é\n", "it's", "\\d"])
def test_a_value_is_found_as_text_and_as_json_writes_it(text):
    for written in (text, json.dumps(text), json.dumps(text, ensure_ascii=False), repr(text)):
        assert is_written(text, f"before {written} behind")
    assert not is_written("other", text)


def test_reasoning_stands_beside_the_content_or_in_it():
    assert reasoning_and_answer(reply("A.", reasoning_content=" Hm. ")) == ("Hm.", "A.")
    assert reasoning_and_answer(reply("<think>\nHm.\n</think>\n\nA.")) == ("Hm.", "A.")
    assert reasoning_and_answer(reply("Write </think> now.")) == ("", "Write </think> now.")


def test_markers_stand_for_texts_and_arguments_and_occur_nowhere():
    message = reply("see M0", "Paris")
    marker = unused_marker("M0", [message])
    assert marker == "M00"
    changed = with_content(message, marker)
    assert changed["content"] == marker and changed["tool_calls"][0]["function"]["arguments"] == {marker: marker}
    assert marker not in list(strings(message))


def test_common_beginnings_and_blocks_that_touch():
    assert common_prefix("abcd", "abxd") == 2 and common_prefix("", "a") == 0 and common_prefix("ab", "ab") == 2
    assert joined([(0, 2), (2, 5), (7, 9)]) == [(0, 5), (7, 9)]
