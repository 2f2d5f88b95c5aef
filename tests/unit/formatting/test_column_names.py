"""What columns are called, and what may stand beside a text."""

import pytest

from adder.formatting.column_names import canonical_names, is_lone_text, line_for, pair_readings


@pytest.mark.parametrize(
    ("names", "row_format", "columns"),
    [
        (("instruction", "response"), "alpaca", {"instruction": "instruction", "output": "response"}),
        (("query", "response"), "question_answer", {"question": "query", "answer": "response"}),
        (("problem", "solution"), "question_answer", {"question": "problem", "answer": "solution"}),
        (("inputs", "targets"), "question_answer", {"question": "inputs", "answer": "targets"}),
        (("input", "output"), "question_answer", {"question": "input", "answer": "output"}),
        (("instruction", "input", "response"), "alpaca", {"instruction": "instruction", "output": "response"}),
        (("prompt", "response"), "prompt_completion", {"prompt": "prompt", "completion": "response"}),
        (("Problem", "SOLUTION"), "question_answer", {"question": "Problem", "answer": "SOLUTION"}),
        (("message_1", "message_2"), "question_answer", {"question": "message_1", "answer": "message_2"}),
        (("user", "assistant"), "question_answer", {"question": "user", "answer": "assistant"}),
        (("user", "question", "answer"), "question_answer", {"question": "question", "answer": "answer"}),
    ],
)
def test_a_prompt_and_its_reply_have_many_names(names, row_format, columns):
    assert pair_readings(names) == [(row_format, columns)]


@pytest.mark.parametrize("names", [("question", "label"), ("user", "answer"), ("text",), ("summary", "document"), ()])
def test_columns_that_are_no_pair(names):
    assert pair_readings(names) == []


def test_two_prompts_or_replies_are_two_readings_unless_one_is_named():
    names = ("problem", "solution", "answer")
    both = [("question_answer", {"question": "problem", "answer": name}) for name in ("answer", "solution")]
    assert pair_readings(names) == both
    assert pair_readings(names, ["answer"]) == both[:1]
    assert len(pair_readings(("question", "Question", "answer"))) == 2


def test_names_are_known_whatever_their_case():
    assert canonical_names(("Question", "System Prompt", "x"), ("question", "system_prompt", "answer")) == {
        "question": "Question", "system_prompt": "System Prompt"
    }  # fmt: skip
    assert canonical_names(("question", "Question"), ("question",)) == {}
    assert canonical_names(("QUESTION", "Question"), ("question",)) == {}


@pytest.mark.parametrize(
    "others",
    [(), ("id",), ("url", "date_download", "quality_score"), ("title", "url"), ("meta", "token_count"), ("ID", "Date")],
)
def test_a_text_with_where_it_is_from_is_a_text(others):
    assert is_lone_text(frozenset(("text", *others)))


@pytest.mark.parametrize(
    "other", ["summary", "sentiment", "role", "prompt", "label", "title", "translation", "target", "class", "intent"]
)
def test_a_text_beside_what_could_be_learnt_from_it_is_not(other):
    assert not is_lone_text(frozenset(("text", "id", other)))


def test_a_line_of_settings_is_yaml():
    assert line_for({"question": "Problem", "answer": "a b"}) == "columns: {question: Problem, answer: a b}"
    assert line_for({"question": "a: b"}) == 'columns: {question: "a: b"}'
