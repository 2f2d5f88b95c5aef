"""Templates of prompt, system and completion, and what messages call their keys and roles."""

import json
from collections import Counter

import pytest

from adder.core.errors import UserError
from adder.formatting.rejected import Rejected
from adder.formatting.row_fields import row_fields
from adder.formatting.row_formats import source_format, to_conversation, to_prompt
from adder.formatting.row_notes import column_notes, notes_of
from format_stage import reply, system, user

PAIR = {"prompt": "{frage}", "completion": "{antwort}"}


def source_of(row, protected=False, **settings):
    reading = {"row_format": "auto", "columns": {}, "weight": 1.0, "split": None, **settings}
    fields = row_fields("rows", reading, set(row), protected)
    sets = Counter({tuple(row): 1})
    return source_format(
        "rows", reading["row_format"], reading["columns"], sets, protected, fields, reading.get("values")
    )


def read(row, **settings):
    return to_conversation(row, source_of(row, **settings))


QUIZ = {"question": "q", "choices": ["x", "y", "z"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "settings", "asked", "replied"),
    [
        ({"t": "q", "label": 0}, {"values": {"label": {"0": "bad", "1": "good"}}}, "q", "bad"),
        ({"t": "q", "label": 1.0}, {"values": {"label": {"0": "bad", "1": "good"}}}, "q", "good"),
        ({"t": "q", "label": "1"}, {"values": {"label": {"0": "bad", "1": "good"}}}, "q", "good"),
        ({"t": "q", "label": True}, {"values": {"label": {"true": "yes", "false": "no"}}}, "q", "yes"),
        ({"t": "q", "label": [1, 0]}, {"values": {"label": {"0": "x", "1": "y"}}}, "q", '["y", "x"]'),
        ({"t": 2, "label": "a"}, {"values": {"t": {"2": "two"}}}, "two", "a"),
    ],
)
def test_values_that_are_numbers_have_the_names_that_the_source_gives_them(row, settings, asked, replied):
    source = source_of(row, prompt="{t}", completion="{label}", **settings)
    assert to_conversation(row, source)["messages"] == [user(asked), reply(replied)]
    assert not any("a number" in note for note in notes_of(row, source))


def test_an_option_that_a_number_names_needs_a_line_which_is_printed():
    with pytest.raises(Rejected, match=r"`values: \{answer: \[A, B, C\]\}` says which one a number is, counted from 0"):
        read(QUIZ)
    values = {"answer": {"0": "A", "1": "B", "2": "C"}}
    assert messages_of(QUIZ, values=values) == [user("q\n\nA. x\nB. y\nC. z"), reply("B")]
    with pytest.raises(Rejected, match="a value that `values` gives no name: answer is '3'; it names 0, 1, 2"):
        read({**QUIZ, "answer": 3}, values=values)
    with pytest.raises(UserError, match="`values` names the column 'label', which no row has"):
        read(QUIZ, values={"label": {"0": "A"}})
    protected = source_of(QUIZ, protected=True, values=values)
    assert to_prompt({**QUIZ, "answer": 3}, protected)["messages"] == [user("q"), reply("")]


def messages_of(row, **settings):
    return read(row, **settings)["messages"]


@pytest.mark.parametrize(
    ("row", "settings", "messages"),
    [
        ({"frage": "q", "antwort": "a", "id": 3}, PAIR, [user("q"), reply("a")]),
        ({"Frage": "q", "Antwort": "a"}, PAIR, [user("q"), reply("a")]),
        (
            {"context": "c", "question": "q", "answer": "a"},
            {"prompt": "{context}\n\n{question}"},
            [user("c\n\nq"), reply("a")],
        ),
        (
            {"context": "c", "question": "q", "answer": "a"},  # the context isn't added by itself as well
            {"prompt": "Q: {question}"},
            [user("Q: q"), reply("a")],
        ),
        (
            {"context": "c", "question": "q", "a": "x", "b": "y"},  # and here it is
            {"completion": "{a} {b}"},
            [user("c\n\nq"), reply("x y")],
        ),
        (
            {"question": "q", "answer": "a", "persona": "a pirate"},
            {"system": "You are {persona}."},
            [system("You are a pirate."), user("q"), reply("a")],
        ),
        ({"question": "q", "answer": "a"}, {"system": "Be {{brief}}."}, [system("Be {brief}."), user("q"), reply("a")]),
        ({"question": "q", "answer": "a", "p": None}, {"system": "{p}"}, [user("q"), reply("a")]),
        (
            {"messages": [user("q"), reply("a")], "p": "s"},
            {"system": "{p}"},
            [system("s"), user("q"), reply("a")],
        ),
        (
            {"system_prompt": "old", "q": "q", "r": "a"},
            {"prompt": "{q}", "completion": "{r}"},
            [system("old"), user("q"), reply("a")],
        ),
        (
            {"system_prompt": "old", "q": "q", "r": "a"},
            {"prompt": "{q}", "completion": "{r}", "system": "new"},
            [system("new"), user("q"), reply("a")],
        ),
        (
            {"q": "q", "answers": {"text": ["x", "y"], "start": [3]}},
            {"prompt": "{q}", "completion": "{answers.text.0}"},
            [user("q"), reply("x")],
        ),
        (
            {"q": "q", "answers": json.dumps({"text": ["x"]})},
            {"prompt": "{q}", "completion": "{answers.text.-1}"},
            [user("q"), reply("x")],
        ),
        (
            {"q": "q", "choices": ["x", "y"], "key": "B"},
            {"prompt": "{q}\n{choices}", "completion": "{key}"},
            [user("q\nA. x\nB. y"), reply("B")],
        ),
        (
            {"q": "q", "docs": [{"title": "t", "text": "d"}, {"title": "u", "text": "e"}], "r": "a"},
            {"prompt": "{docs}\n\n{q}", "completion": "{r}"},
            [user("t\nd\n\nu\ne\n\nq"), reply("a")],
        ),
        ({"n": 3, "r": {"x": 1}}, {"prompt": "Square {n}", "completion": "{r}"}, [user("Square 3"), reply('{"x": 1}')]),
        ({"a": "1", "b": None, "r": "a"}, {"prompt": "{a}\n\n{b}", "completion": "{r}"}, [user("1"), reply("a")]),
        (
            {"turns": [user("q")], "r": [reply("a")]},
            {"prompt": "{turns}", "completion": "{r}"},
            [user("q"), reply("a")],
        ),
        (
            {"q": "q", "why": "w", "r": "a"},
            {"prompt": "{q}", "completion": "<b>{r}</b>"},
            [user("q"), reply("<b>a</b>")],
        ),
        (
            {"q": "q", "reasoning": "w", "r": "a"},
            {"prompt": "{q}", "completion": "{r}"},
            [user("q"), reply("a", reasoning_content="w")],
        ),
        (
            {"q": "q", "reasoning": "w", "r": "a"},
            {"prompt": "{q}", "completion": "{reasoning} {r}"},
            [user("q"), reply("w a")],
        ),
    ],
)
def test_templates_make_the_conversation(row, settings, messages):
    assert messages_of(row, **settings) == messages


TURNS = [{"speaker": "customer", "utterance": "q"}, {"speaker": "Agent", "utterance": "a"}]
NAMES = {
    "message_keys": {"role": "speaker", "content": "utterance"},
    "roles": {"customer": "user", "agent": "assistant", "1": "assistant", "0": "user"},
}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": TURNS}, NAMES),
        ({"messages": json.dumps(TURNS)}, NAMES),
        ({"conversations": TURNS}, NAMES),
        ({"dialogue": TURNS}, {**NAMES, "columns": {"messages": "dialogue"}}),
        (
            {"messages": [{"from": "customer", "value": "q"}, {"from": "agent", "value": "a"}]},
            {"roles": NAMES["roles"]},
        ),
        ({"messages": [{"role": 0, "text": "q"}, {"role": 1, "text": "a"}]},
         {"message_keys": {"content": "text"}, "roles": NAMES["roles"]}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, NAMES),
        ({"prompt": TURNS[:1], "completion": TURNS[1]}, NAMES),
        ({"ask": TURNS[:1], "reply": TURNS[1:]}, {**NAMES, "prompt": "{ask}", "completion": "{reply}"}),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, {**NAMES, "row_format": "preference"}),
    ],
)  # fmt: skip
def test_messages_with_other_keys_and_roles(row, settings):
    assert messages_of(row, **settings) == [user("q"), reply("a")]
    assert list(notes_of(row, source_of(row, **settings))) == []


def test_what_is_beside_templates_is_still_heeded():
    row = {"q": "q", "r": "a", "tools": [{"name": "f"}], "label": True}
    assert read(row, prompt="{q}", completion="{r}")["tools"] == [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(Rejected, match="is not to be learnt"):
        read({**row, "label": False}, prompt="{q}", completion="{r}")
    with pytest.raises(Rejected, match="images"):
        read({**row, "images": ["x.png"]}, prompt="{q}", completion="{r}")
    with pytest.raises(Rejected, match="names an option that the prompt doesn't show.*choices"):
        read({"q": "q", "choices": ["x", "y"], "key": "B"}, prompt="{q}", completion="{key}")
    with pytest.raises(Rejected, match="more than one system message"):
        read({"messages": [system("s"), user("q"), reply("a")]}, system="t")


@pytest.mark.parametrize("value", [None, "", "  ", [], {}])
def test_an_empty_column_is_refused_where_the_row_would_be_without_it(value):
    with pytest.raises(Rejected, match="content is empty: `prompt`: the column q"):
        read({"q": value, "r": "a"}, prompt="Say {q}", completion="{r}")
    with pytest.raises(Rejected, match="content is empty: `completion`: the column s"):
        read({"q": "q", "r": "a", "s": value}, prompt="{q}", completion="{r} {s}")


def test_templates_that_cannot_be_followed_are_refused_at_once():
    row = {"context": "c", "q": "q", "answer": "a", "solution": "s"}
    with pytest.raises(
        UserError, match="`prompt` names the column 'question', which no row has. The columns there: ans"
    ):
        read(row, prompt="{question}", completion="{answer}")
    with pytest.raises(
        UserError, match="only `prompt` is set, .* reply can't be told: it may be answer, solution. Add `comp"
    ):
        read(row, prompt="{q}")
    with pytest.raises(
        UserError, match="only `completion` is set, and which column is the prompt can't be told: no column"
    ):
        read(row, completion="{answer}")
    with pytest.raises(UserError, match="`system` is for conversations, and the row format text has none"):
        read({"text": "t"}, system="s")


def test_a_template_says_what_a_test_set_asks():
    row = {"frage": "q"}
    asked = to_prompt(row, source_of(row, protected=True, prompt="Say: {frage}"))
    assert asked["messages"] == [user("Say: q"), reply("")]
    row = {"frage": "q", "antwort": "a"}
    assert to_prompt(row, source_of(row, protected=True, **PAIR))["messages"] == [user("q"), reply("a")]


def test_what_templates_take_is_said():
    row = {"context": None, "question": "q", "answer": 4, "other": "x"}
    source = source_of(row, prompt="{context}\n{question}", completion="{answer}")
    assert set(notes_of(row, source)) == {
        "'answer' in `completion` is a number, written as JSON", "'context' in `prompt` is empty",
    }  # fmt: skip
    assert column_notes(source, Counter({tuple(row): 2}), []) == [
        "`prompt` is made of context and question", "`completion` is made of answer",
        "nothing reads the columns other (2 rows)",
    ]  # fmt: skip
