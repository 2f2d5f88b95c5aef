"""Which form references have, and when a reply is an exact match in each."""

import pytest

from adder.evaluation.reference_forms import choose_kind, final_answer, is_match, parse_object, same


@pytest.mark.parametrize(
    ("references", "kind"),
    [
        (['{"a": 1}', ' {"b": {}}\n'], "json"),
        (['{"a": 1}', "[1]"], "text"),
        (['{"a": NaN}'], "text"),
        (["so it is 3\n#### 3", "#### 1,000"], "final_answer"),
        (["#### 3", "three"], "text"),
        (["so\n#### 3,5", "#### 12,25"], "final_answer_comma"),
        (["#### 10:30", "#### 3/4"], "final_answer"),
        (["# Report\n#### Step 2\nThen go on.", "#### 3"], "text"),  # a heading of Markdown
        (["Then:\n#### Conclusion", "Well:\n#### Summary"], "text"),
        ([], "text"),
    ],
)
def test_kind_follows_from_all_references(references, kind):
    assert choose_kind(references) == kind


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, True, False),
        (0, False, False),
        (20, 20.0, True),
        ("20", 20, False),
        (None, False, False),
        (None, None, True),
        ({"a": 1, "b": [1, {"c": None}]}, {"b": [1, {"c": None}], "a": 1}, True),
        ({"a": [True]}, {"a": [1]}, False),
        ({"a": None}, {}, False),
        ([1, 2], [2, 1], False),
    ],
)
def test_equality_of_json_values(a, b, equal):
    assert same(a, b) is equal and same(b, a) is equal


@pytest.mark.parametrize(
    "reply", ["", "null", "[]", '{"a": 1', '```json\n{"a": 1}\n```', '{"a": Infinity}', "[" * 9999]
)
def test_what_is_not_a_json_object(reply):
    assert parse_object(reply) is None
    assert not is_match("json", '{"a": 1, "b": null}', reply)


def test_key_order_and_spaces_do_not_matter_but_types_do():
    assert is_match("json", '{"a": 1, "b": "x"}', ' {"b":"x","a":1}\n')
    assert not is_match("json", '{"a": 1}', '{"a": "1"}')
    assert not is_match("json", '{"a": null}', "{}")


@pytest.mark.parametrize(
    ("reply", "right"),
    [("2 + 2 = 4\n#### 4", 1), ("#### 4.0", 1), ("#### 5", 0), ("4", 0), ("#### 5\n#### 4.", 1), ("#### 40", 0)],
)
def test_final_answers(reply, right):
    assert is_match("final_answer", "It is four.\n#### 4", reply) == right


@pytest.mark.parametrize(
    ("reference", "reply", "right"),
    [
        ("1,250", "1250.00", True),
        ("-0.50", "-0.5", True),
        ("3/4", "3/5", False),
        ("3/4", "0.75", True),
        ("10:30", "10:45", False),
        ("10:30", " 10:30 ", True),
        ("5e3", "5000", True),
        ("5e3", "5", False),
        ("18", "$18", True),
        ("18", "18 dollars.", True),
        ("5 km", "5 m", False),
        ("50 %", "50%", True),
        ("50 %", "0.5", True),
        ("50 %", "5", False),
        ("3,5", "35", False),
        ("3,5", "3.5", True),
        ("Paris", "paris", True),
        ("7 March", "8 March", False),
        # What is no plain number.
        ("5", "x = 5", True),
        ("x=5", "x = 5", True),
        ("x=5", "y=5", False),
        ("x=5", "x=6", False),
        ("(1, 2)", "(1,2)", True),
        ("1, 2", "12", False),
        ("1 2", "12", False),
        ("B", "(B)", True),
        ("9:05", "09:05", True),
        ("9:05", "9:50", False),
        ("5 am", "5 pm", False),
        ("\\sqrt{2}", "\\sqrt2", True),
        ("\\sqrt{2}", "2", False),
        ("2\\pi", "2", False),
        ("yes", "\\text{Yes}", True),
        ("1 million", "1", False),
        ("1,000,000", "1 million", True),
        ("5", "5x", False),
        ("3", "3!", False),
        ("2", "2 to 3", False),
    ],
)
def test_final_answers_are_numbers_where_both_are(reference, reply, right):
    assert is_match("final_answer", f"So:\n#### {reference}", f"#### {reply}") is right
    assert is_match("final_answer", f"#### {reference}", f"So:\n#### {reply}") is right
    assert is_match("final_answer", f"#### {reply}", f"#### {reference}") is right
    assert is_match("final_answer", f"#### {reference}", f"#### {reference}")
    assert is_match("final_answer", f"#### {reply}", f"#### {reply}")


def test_the_datas_habit_says_what_a_comma_is():
    assert is_match("final_answer", "#### 1,234", "#### 1234") and is_match(
        "final_answer_comma", "#### 1,234", "#### 1,2340"
    )
    assert not is_match("final_answer_comma", "#### 1,234", "#### 1234")
    assert final_answer("a\n#### 1,250 apples\nb") == "1,250 apples" and final_answer("no sign") is None


def test_text_is_compared_without_space_around():
    assert is_match("text", "Yes.", " Yes.\n")
    assert not is_match("text", "Yes.", "yes.")
