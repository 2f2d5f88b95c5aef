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


def test_final_answer_ignores_thousands_commas():
    assert final_answer("#### 1,250") == final_answer("#### 1250.00") == "1250"
    assert final_answer("#### -0.50") == "-0.5"


def test_text_is_compared_without_space_around():
    assert is_match("text", "Yes.", " Yes.\n")
    assert not is_match("text", "Yes.", "yes.")
