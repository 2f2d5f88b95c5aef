"""Spans that say which parts of a reply are to be learnt."""

import pytest

from adder.formatting.rejected import Rejected
from adder.formatting.train_spans import covers, unlearnt_parts
from format_stage import call, read, reply, result, user

TEXT = "I'm doing very well, thank you!"


def span(begin, end, train, begins="begin_offset", ends="end_offset"):
    return {begins: begin, ends: end, "train": train}


def unlearnt(spans, text=TEXT, key="train_detail"):
    return [text[start:end] for start, end in unlearnt_parts(spans, key, text, "m")]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([span(0, 8, False), span(9, 18, True), span(19, 30, False)], ["I'm doing", ", thank you!"]),  # axolotl's
        ([span(19, 30, False), span(0, 8, False), span(9, 18, True)], ["I'm doing", ", thank you!"]),
        ([span(0, 9, False), span(9, 31, True)], ["I'm doing"]),  # ends that can only be behind their spans
        ([span(0, 9, False, "start", "end"), span(9, 31, True, "start", "end")], ["I'm doing"]),
        ([span(0, 8, False, "begin", "end"), span(9, 30, True, "begin", "end")], ["I'm doing"]),
        ([span(10, 19, True, "start", "end")], ["I'm doing", ", thank you!"]),
        ([[10, 19]], ["I'm doing", ", thank you!"]),
        ([[0, 9, False]], ["I'm doing"]),
        ([span(10, 18, True)], ["I'm doing", ", thank you!"]),  # what no span speaks of
        ([span(10, 18, False)], ["very well"]),
        ([span(0, 8, True), span(10, 18, False)], ["very well, thank you!"]),
        ([span(0, 30, True)], []),
        ([span(0, 30, False)], [TEXT]),
        ([{"begin_offset": 0, "end_offset": 8, "weight": 0}, {"begin_offset": 9, "end_offset": 30, "weight": 1}],
         ["I'm doing"]),
        ([{"begin_offset": 0, "end_offset": 8, "mask": True}], ["I'm doing"]),
        ([], []),
    ],
)  # fmt: skip
def test_parts_that_are_not_learnt(spans, expected):
    assert unlearnt(spans) == expected


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"begin_offset": 0}, "an object, not a list"),
        ("0-3", "text, not a list"),
        (["0-3"], "text among them"),
        ([{"begin_offset": 0, "train": True}], "as whole numbers"),
        ([span("0", 3, True)], "as whole numbers"),
        ([span(0, 31, True), span(32, 40, False)], "isn't within the 31 characters"),
        ([span(-3, 8, True)], "isn't within"),
        ([span(9, 3, True)], "isn't within"),
        ([span(0, 10, True), span(5, 20, False)], "overlap say both"),
        ([span(0, 10, "no")], "needs `train: true`"),
        ([span(0, 10, 0.5)], "needs `train: true`"),
    ],
)
def test_spans_that_cannot_be_read_are_refused(spans, message):
    with pytest.raises(Rejected, match=f"spans of a reply that can't be read: m.*{message}"):
        unlearnt(spans)


def test_parts_that_are_all_of_a_text():
    assert covers([(1, 3)], " ab ") and not covers([(1, 2)], " ab ") and not covers([], " ab ")


@pytest.mark.parametrize("key", ["train_detail", "training_detail", "loss_spans"])
def test_a_reply_of_which_parts_are_learnt(key):
    spans = [span(0, 8, False), span(9, 30, True)]
    assert read({"messages": [user("q"), reply(TEXT, **{key: spans})]})["messages"][-1] == reply(
        TEXT, unlearnt=[(0, 9)]
    )
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": TEXT, key: spans}]
    assert read({"conversations": turns})["messages"][-1] == reply(TEXT, unlearnt=[(0, 9)])
    assert read({"messages": [user("q"), reply(TEXT, **{key: None})]})["messages"][-1] == reply(TEXT)
    assert read({"messages": [user("q"), reply(TEXT, **{key: [span(0, 30, True)]})]})["messages"][-1] == reply(TEXT)


def test_a_reply_of_which_nothing_is_learnt():
    none = {"train_detail": [span(0, 30, False)]}
    with pytest.raises(Rejected, match="no reply to train on"):
        read({"messages": [user("q"), reply(TEXT, **none)]})
    rows = [user("q"), reply(TEXT, **none), user("r"), reply("a")]
    assert read({"messages": rows})["messages"][1] == reply(TEXT, train=False)
    calls = [call("f", {})]
    called = [user("q"), reply(TEXT, **none, tool_calls=calls), result("1"), reply("a")]
    assert read({"messages": called})["messages"][1] == reply(TEXT, tool_calls=calls, unlearnt=[(0, 31)])
    assert read({"messages": [user("q"), reply(TEXT, **none, reasoning="r")]})["messages"][1]["unlearnt"] == [(0, 31)]
