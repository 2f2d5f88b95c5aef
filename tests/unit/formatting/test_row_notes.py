"""What the run says of rows that it uses: in the terminal, and in the card."""

from collections import Counter

import pytest

from adder.formatting.row_notes import column_notes, listed, notes_of, notes_of_calls
from format_stage import call, format_of, format_rows, qa, read, reply, result, user


def test_columns_that_nothing_reads_are_named_with_their_rows():
    row = {"question": "q", "answer": "a", "context": "c", "level": 3, "label": True}
    source = format_of(row)
    sets = Counter({tuple(row): 3, ("question", "answer", "id"): 2})
    notes = column_notes(source, sets, [])
    assert notes == ["part of the prompt: context", "nothing reads the columns level (3 rows), id (2 rows)"]
    assert column_notes(source, sets, ["level", "id"]) == notes[:1]


def test_a_mapping_is_said_as_the_line_that_it_is_instead_of():
    row = {"Problem": "q", "solution": "a"}
    notes = column_notes(format_of(row), Counter({tuple(row): 1}), [])
    assert notes == ["read as if it had the line `columns: {question: Problem, answer: solution}`"]


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({"messages": [user("q"), reply("a", mood="m", train=True, name=None)]}, ["nothing reads the key 'mood' of m"]),
        ({"messages": [{**user("q"), "train": True}, reply("a")]}, ["'train: true' of messages that are no replies"]),
        ({"messages": [{**user("q"), "train": False}, reply("a")]}, []),
        ({"messages": [user("q"), reply(4)]}, ["a message's content is a number, written as JSON"]),
        ({"question": "q", "answer": 4}, ["'answer' is a number, written as JSON"]),
        ({"question": "q", "answer": False}, ["'answer' is true or false, written as JSON"]),
        ({"query": "q", "response": {"a": 1}}, ["'response' is an object, written as JSON"]),
        ({"question": "q", "answer": "a"}, []),
        ({"messages": [user("q"), reply("a")]}, []),
        ({"text": "t", "id": 3}, []),
        ({"prompt": "q", "completion": reply("a")}, []),
        ({"prompt": "q", "completion": reply("a", mood="m")}, ["nothing reads the key 'mood' of messages"]),
    ],
)
def test_what_is_to_be_known_of_a_row(row, notes):
    found = list(notes_of(row, format_of(row)))
    assert len(found) == len(notes) and all(one.startswith(note) for one, note in zip(found, notes, strict=True))


def test_each_note_is_in_the_card_once_with_its_count(tmp_path):
    rows = [{"messages": [user(f"q {n}"), reply("a", mood="m")], "level": n} for n in range(5)]
    formatted = format_rows(tmp_path, rows, {"size": 1})
    assert formatted.card["notes"] == [
        "rows: nothing reads the columns level (5 rows)",
        "rows: nothing reads the key 'mood' of messages (5 rows)",
    ]
    numbers = format_rows(tmp_path / "numbers", [qa(f"q {n}", n) for n in range(5)], {"size": 1})
    assert numbers.card["notes"] == ["rows: 'answer' is a number, written as JSON (5 rows)"]
    assert {row["messages"][-1]["content"] for row in numbers.train + numbers.heldout} == set("01234")


def test_a_line_names_a_dozen_columns_and_how_many_more():
    assert listed({f"c{n}": 1 for n in range(14)}).endswith("c11 (1 rows), 2 more")


def test_calls_of_tools_that_are_nowhere_and_without_results_are_noted():
    def noted(messages, **more):
        return notes_of_calls(read({"messages": [user("q"), *messages], **more}))

    calls = reply("", tool_calls=[call("f", {})])
    whole = [calls, result("r"), reply("a")]
    assert noted(whole, tools=[{"name": "f"}]) == noted([calls], tools=[{"name": "f"}]) == noted([reply("a")]) == []
    assert noted(whole, tools=[{"name": "g"}]) == ["the tool 'f' is called, which the row's tools don't define"]
    assert noted(whole) == ["tools are called, and no column defines any"]
    unanswered = ["a tool call has no result before the next turn"]
    assert noted([calls, user("r"), reply("a")], tools=[{"name": "f"}]) == unanswered
    two = reply("", tool_calls=[call("f", {}), call("f", {"x": 1})])
    assert noted([two, result("r"), reply("a")], tools=[{"name": "f"}]) == unanswered


CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_calls_that_stand_in_the_text_of_replies_are_said():
    talk = read({"messages": [user("q"), reply(CALL_TEXT)]})
    assert notes_of_calls(talk) == [
        "replies call tools in their text, which is learnt as it stands, whatever the model's own way is"
    ]
    assert notes_of_calls(read({"messages": [user("q"), reply('{"name": "Bob", "age": 3}')]})) == []


@pytest.mark.parametrize("marked", ["### Human: q\n### Assistant:", "<s>[INST] q [/INST]", "<|im_start|>user\nq"])
def test_marks_of_a_template_within_a_prompt_are_said(marked):
    (note,) = notes_of_calls(read({"prompt": marked, "completion": "a"}))
    assert note.startswith("messages have the marks of a chat template in their text")
    assert notes_of_calls(read({"prompt": "# Human rights", "completion": "a"})) == []


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answers": {"text": ["a"], "answer_start": [3]}},
        {"question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [["s"]]}},
        {"question": "q", "answer": "a", "table": {"header": ["h"], "rows": [["c"]]}},
        {"question": "q", "answer": {"name": "f", "arguments": {}}, "tools": [{"name": "f"}]},
    ],
)
def test_of_objects_whose_texts_are_read_none_is_said_to_be_json(row):
    assert list(notes_of(row, format_of(row))) == []


def test_a_column_of_which_a_part_is_read_is_no_part_of_the_prompt():
    row = {"input": {"messages": [user("q")]}, "output": "a"}
    source = format_of(row, columns={"prompt": "input.messages", "completion": "output"})
    assert not any("part of the prompt" in note for note in column_notes(source, Counter({tuple(row): 1}), []))
    assert list(notes_of(row, source)) == []
