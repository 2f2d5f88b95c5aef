"""Templates with columns in braces."""

import pytest

from adder.data.field_template import Field, FieldTemplate, folded, parse


def test_text_and_columns_in_turn():
    assert parse("{context}\n\n{ question }?").parts == (
        Field("context", "context"), "\n\n", Field("question", "question"), "?",
    )  # fmt: skip
    assert parse("You are {{helpful}}.").parts == ("You are ", "{", "helpful", "}", ".")
    assert parse("").parts == () and parse("plain").fields == []


@pytest.mark.parametrize("template", ["{}", "{ }", "{a", "a}", "{a}}", "{{a}", '{"x": {a}}'])
def test_a_brace_that_names_no_column_is_refused(template):
    with pytest.raises(ValueError, match=r"names no column; \{question\} stands for"):
        parse(template)


@pytest.mark.parametrize(
    ("written", "columns", "column", "path"),
    [
        ("question", {"question", "Question"}, "question", ()),
        ("question", {"Question"}, "Question", ()),
        ("Question text", {"Question text"}, "Question text", ()),
        ("question_text", {"Question text"}, "Question text", ()),
        ("answers.text.0", {"answers"}, "answers", ("text", "0")),
        ("answers.text", {"answers.text", "answers"}, "answers.text", ()),
    ],
)
def test_a_field_is_found_among_the_columns(written, columns, column, path):
    assert parse(f"{{{written}}}").bound(columns) == FieldTemplate((Field(written, column, path),))


@pytest.mark.parametrize("columns", [{"b"}, {"Question", "QUESTION"}, set()])
def test_a_field_that_is_no_column_is_named(columns):
    with pytest.raises(KeyError, match="question"):
        parse("{question}").bound(columns)


def test_names_are_compared_without_case_spaces_and_hyphens():
    assert folded(" Question-Text A") == "question_text_a"
