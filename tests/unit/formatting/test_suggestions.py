"""What to write for rows of an unknown form: lines that can be taken over as they stand, and make what is meant."""

import re
from collections import Counter

import pytest
import yaml

from adder.data.fetch_rows import reading_of
from adder.data.stage import Source
from adder.formatting.rejected import Rejected
from adder.formatting.row_fields import row_fields
from adder.formatting.row_formats import source_format, to_conversation
from adder.formatting.suggestions import lines_beside, lines_for
from format_stage import read, reply, user


def settings_in(text):
    """The settings that stand between backticks, but those with something to fill in."""
    found = {}
    for line in re.findall(r"`([^`]*)`", text):
        if "…" not in line and not line.startswith("convert"):
            found |= yaml.safe_load(line)
    return found


def read_as(row, **settings):
    """The messages of a row in a source with these settings, which a configuration might have."""
    reading = reading_of(Source(path="rows.jsonl", **settings), None)
    fields = row_fields("rows", reading, set(row))
    sets = Counter({tuple(row): 1})
    form = source_format("rows", reading["row_format"], reading["columns"], sets, False, fields, reading.get("values"))
    return to_conversation(row, form)["messages"]


PIECES = {"start": 0, "end": 3, "label": "PER"}


@pytest.mark.parametrize(
    ("row", "asked", "replied"),
    [
        ({"text": "T", "summary": "S", "id": 1}, "T", "S"),
        ({"article": "T", "highlights": "S", "id": "1"}, "T", "S"),
        ({"id": "1", "dialogue": "A: " + 9 * "hi ", "topic": "t", "summary": "S"}, "A: " + 9 * "hi ", "S"),
        ({"translation": {"en": "E", "de": "D"}}, "E", "D"),
        ({"en": "E", "de": "D"}, "E", "D"),
        ({"source": "E", "target": "D"}, "E", "D"),
        ({"src": "E", "tgt": "D"}, "E", "D"),
        ({"text": "T", "label": "L"}, "T", "L"),
        ({"review": "T", "sentiment": "L"}, "T", "L"),
        ({"premise": "P", "hypothesis": "H", "label": 0}, "P\n\nH", "0"),
        ({"text": "Bob", "entities": [PIECES]}, "Bob", '[{"start": 0, "end": 3, "label": "PER"}]'),
        ({"text": "Bob", "labels": ["a", "b"]}, "Bob", '["a", "b"]'),
        (
            {"table": {"header": ["A"], "rows": [["1"]]}, "question": "Q", "sql": {"human_readable": "S", "sel": 0}},
            "A\n1\n\nQ",
            "S",
        ),
        ({"db_id": "d", "query": "SELECT 1", "question": "Q"}, "Q", "SELECT 1"),
        ({"id": 1, "sql_prompt": "P", "sql_context": "C", "sql": "S", "sql_explanation": "E"}, "C\n\nP", "S"),
        ({"goal": "G", "sol1": "x", "sol2": "y", "label": 1}, "G\n\nA. x\nB. y", "1"),
        ({"sentence": "S", "option1": "x", "option2": "y", "answer": "2"}, "S\n\n1. x\n2. y", "2"),
        ({"question": "Q", "opa": "x", "opb": "y", "correct": "B"}, "Q\n\nA. x\nB. y", "B"),
        ({"ctx": "C", "endings": ["x", "y"], "label": "B", "split": "val"}, "C\n\nA. x\nB. y", "B"),
        ({"question": "Q", "correct_answer": "water", "distractor1": "x", "distractor2": "y"}, "Q", "water"),
        ({"frage": "Q", "answer": "A"}, "Q", "A"),
    ],
)
def test_the_lines_can_be_taken_over_as_they_stand(row, asked, replied):
    with pytest.raises(Rejected, match="unknown row format") as refused:
        read(row)
    lines = lines_for(row)
    assert lines and lines in str(refused.value)
    assert read_as(row, **settings_in(lines)) == [user(asked), reply(replied)]


def test_turns_under_other_keys_are_told_with_who_speaks():
    row = {"dialogue": [{"speaker": "customer", "utterance": "Q"}, {"speaker": "agent", "utterance": "A"}]}
    lines = lines_for(row)
    assert "says who customer and agent are" in lines
    roles = {"user": "customer", "assistant": "agent"}
    assert read_as(row, **settings_in(lines), roles=roles) == [user("Q"), reply("A")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"message_id": "1", "parent_id": None, "text": "hi", "role": "prompter"}, "each row is one message"),
        ({"prompt": {"text": "q", "replies": [{"text": "a"}]}, "tree": 1}, "prompt is a tree of messages"),
        ({"instruction": "q", "completions": [{"text": "a"}, {"text": "b"}]}, "completions has several replies"),
        ({"prompt": "q", "response_0": "a", "response_1": "b"}, "response_0 and response_1 are several replies"),
        ({"title": "t", "answers": {"text": ["a", "b"], "score": [2, 1]}}, "answers has several replies"),
        ({"system": "s", "chat": "USER: q\n\nASSISTANT: a"}, "chat is a conversation written out"),
        ({"x": 1}, ""),
        ({}, ""),
    ],
)
def test_what_no_line_reads_is_named(row, said):
    assert lines_for(row).startswith(said) and bool(lines_for(row)) is bool(said)
    with pytest.raises(Rejected, match=f"unknown row format.*{said}"):
        read(row)


def test_numbers_that_stand_for_words_can_be_given_names():
    row = {"text": "T", "label": 1}
    assert "`values: {label: {0: …, 1: …}}`" in lines_for(row)
    settings = settings_in(lines_for(row))
    assert read_as(row, **settings, values={"label": {0: "bad", 1: "good"}}) == [user("T"), reply("good")]


def test_of_messages_in_several_columns_one_is_to_be_chosen():
    talk = [user("q"), reply("a")]
    with pytest.raises(Rejected, match=r"conversation_a \(and in conversation_b, of which one is to be chosen\)"):
        read({"conversation_a": talk, "conversation_b": talk, "winner": "a"})


@pytest.mark.parametrize("more", [{}, {"non_preferred_output": [reply("b")]}])
def test_a_reply_beside_messages_within_a_column_is_found(more):
    row = {"input": {"messages": [user("q")]}, "preferred_output": [reply("a")], **more}
    lines = lines_beside(row, "input.messages")
    with pytest.raises(Rejected) as refused:
        read(row)
    assert lines in str(refused.value)
    assert read_as(row, **settings_in(lines)) == [user("q"), reply("a")]
