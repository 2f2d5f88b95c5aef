"""Columns that belong to what is asked stand in the prompt, or the row is refused."""

import pytest

from adder.formatting.rejected import Rejected
from adder.formatting.task_columns import NO_OPTIONS, document_text, labelled
from format_stage import read, reply, system, user


def messages_of(row, *args):
    return read(row, *args)["messages"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "answer": "a", "context": "c"}, "c\n\nq"),
        ({"question": "q", "answer": "a", "documents": ["c", "d"]}, "c\n\nd\n\nq"),
        ({"question": "q", "answer": "a", "documents": [{"title": "t", "text": "c"}]}, "t\nc\n\nq"),
        ({"question": "q", "answer": "a", "context": {"x": 1}}, '{"x": 1}\n\nq'),
        ({"question": "In c, q", "answer": "a", "context": "c"}, "In c, q"),
        ({"question": "q", "answer": "a", "context": None, "choices": []}, "q"),
        ({"question": "q", "answer": "B", "choices": ["x", "y"]}, "q\n\nA. x\nB. y"),
        ({"question": "q", "answer": "y", "options": {"A": "x", "B": "y"}}, "q\n\nA. x\nB. y"),
        ({"question": "q", "answer": "2", "choices": {"label": ["1", "2"], "text": ["x", "y"]}}, "q\n\n1. x\n2. y"),
        ({"question": "q A. x B. y", "answer": "B", "options": ["x", "y"]}, "q A. x B. y"),
        ({"instruction": "i", "output": "a", "context": "c"}, "i\n\nc"),
        ({"instruction": "i", "response": "a", "context": "c"}, "i\n\nc"),
        ({"instruction": "i", "input": "n", "output": "a", "context": "c"}, "i\n\nn\n\nc"),
        ({"instruction": "i", "input": 0, "output": "a"}, "i\n\n0"),
        ({"instruction": "i", "input": False, "output": "a"}, "i\n\nfalse"),
        ({"prompt": "p", "completion": "a", "input": "n"}, "p\n\nn"),
        ({"prompt": [user("p")], "completion": "a", "input": "n"}, "p\n\nn"),
        ({"Question": "q", "Answer": "a", "Context": "c"}, "c\n\nq"),
        ({"query": "q", "response": "a", "passage": "c"}, "c\n\nq"),
        ({"context": "c", "input": "q", "output": "a"}, "c\n\nq"),
    ],
)
def test_what_a_row_is_about_is_part_of_its_prompt(row, prompt):
    assert messages_of(row)[-2] == user(prompt)


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": [user("q"), reply("a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"query": "q", "response": "a"},
    ],
)
def test_a_system_column_beside_any_form(row, name):
    assert messages_of({**row, name: "s"}) == [system("s"), user("q"), reply("a")]


def test_two_system_columns_that_differ_are_refused():
    with pytest.raises(Rejected, match="more than one system message"):
        read({"question": "q", "answer": "a", "system": "s", "system_prompt": "t"})


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_beside_a_reply(name):
    row = {"question": "q", "answer": "a", name: "r"}
    assert messages_of(row) == [user("q"), reply("a", reasoning_content="r")]


def test_available_tools_are_tools():
    row = {"question": "q", "answer": "a", "available_tools": [{"name": "f"}]}
    assert read(row)["tools"] == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "B", "A": "x", "B": "y"},
        {"question": "q", "answer": "(b)", "distractors": ["x", "y"]},
        {"prompt": "q", "completion": "C.", "candidates": ["x", "y", "z"]},
        {"question": "q", "answer": 1, "choices": ["x", "y"]},
        {"question": "q", "answer": "1", "choices": ["x", "y"]},
        {"question": "q", "answer": "E", "choices": ["x", "y"]},
    ],
)
def test_a_reply_that_names_an_option_nobody_sees_is_refused(row):
    with pytest.raises(Rejected) as caught:
        read(row)
    assert caught.value.kind == NO_OPTIONS


def test_a_letter_may_be_the_answer():
    assert messages_of({"question": "Which grade?", "answer": "A", "id": 3})[-1] == reply("A")
    assert messages_of({"question": "Which? A) x B) y", "answer": "A", "topic": "t"})[-1] == reply("A")


def test_options_have_labels():
    assert labelled(["x", 2], "choices") == [("A", "x"), ("B", "2")]
    assert labelled([{"label": "i", "text": "x"}], "choices") == [("i", "x")]
    assert labelled("x or y", "choices") == labelled(None, "choices") == []
    with pytest.raises(Rejected, match="options are no list"):
        labelled(3, "choices")


LONG = "The bridge was opened by the mayor. " * 10


@pytest.mark.parametrize("value", [LONG, [LONG[:150], LONG[:150]]])
def test_a_long_text_that_nothing_reads_is_asked_about(value):
    row = {"question": "q", "answer": "fine", "evidence": value}
    with pytest.raises(
        Rejected, match=r"nothing reads the column evidence.*`prompt: \"\{evidence\}\\n\\n\{question\}\""
    ):
        read(row)
    assert read(row, "question_answer")["messages"][0] == user("q")
    with pytest.raises(Rejected, match=r"\{Problem\}.*row_format: question_answer"):
        read({"Problem": "q", "Solution": "fine", "evidence": value})


@pytest.mark.parametrize(
    "more",
    [{"evidence": "short"}, {"source_url": LONG}, {"metadata": LONG}, {"context": LONG}, {"embedding": [0.5] * 999}],
)
def test_other_columns_are_only_named(more):
    assert read({"question": "q", "answer": "fine", **more})["messages"][-1] == reply("fine")
    assert read({"question": LONG * 2, "answer": "fine", "evidence": LONG})["messages"][-1] == reply("fine")


def test_a_number_is_refused_only_where_an_option_has_it():
    row = {"question": "q", "option1": "x", "option2": "y", "answer": "2"}
    with pytest.raises(Rejected, match="names an option that the prompt doesn't show.*option1, option2"):
        read(row)
    assert read({**row, "answer": "7"})["messages"][-1] == reply("7")
    assert read({"question": "1 + 1", "distractors": ["x"], "answer": "2"})["messages"][-1] == reply("2")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([["a", "b"], [1, None]], "a | b\n1 | "),
        ({"header": ["a"], "rows": [["x"], ["y"]], "name": "t"}, "t\na\nx\ny"),
        ({"title": ["t", "u"], "sentences": [["A.", " B."], ["C."]]}, "t\nA. B.\n\nu\nC."),
        ({"is_selected": [0, 1], "passage_text": ["p", "q"]}, "p\n\nq"),
        ([{"idx": 0, "title": "t", "paragraph_text": "p"}], "t\np"),
        ({"text": ["a", "b"], "other": ["c"]}, '{"text": ["a", "b"], "other": ["c"]}'),
    ],
)
def test_tables_and_documents_side_by_side_are_written_as_people_read_them(value, text):
    assert document_text(value, "context") == text


def test_options_that_are_objects_are_shown_by_their_own_label():
    assert labelled([{"id": "x", "text": "1"}, {"text": "2"}, {"label": 3, "text": "c"}], "options") == [
        ("x", "1"), ("B", "2"), ("3", "c"),
    ]  # fmt: skip
