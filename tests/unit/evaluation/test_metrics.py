"""Scores of single replies, worked out by hand."""

import json

import pytest

from adder.core.errors import UserError
from adder.evaluation import metrics as scoring


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
    assert scoring.choose_kind(references) == kind


@pytest.mark.parametrize(
    ("references", "wanted", "metrics", "kind"),
    [
        (['{"a": 1}'], "auto", ["exact_match", "json"], "json"),
        (["#### 3"], "auto", ["exact_match", "final_answer"], "final_answer"),
        (["Yes."], "auto", ["exact_match", "rouge_l", "chrf"], "text"),
        ([], "auto", ["exact_match", "rouge_l", "chrf"], "text"),
        (['{"a": 1}'], ["exact_match"], ["exact_match"], "text"),  # then as text, character for character
        (['{"a": 1}'], ["chrf", "json", "chrf"], ["exact_match", "chrf", "json"], "json"),
        (["so\n#### 3"], ["rouge_l"], ["exact_match", "rouge_l"], "text"),
    ],
)
def test_metrics_follow_from_the_references_or_the_setting(references, wanted, metrics, kind):
    choice = scoring.choose_metrics(references, wanted)
    assert choice.value == metrics and scoring.kind_of(choice.value) == kind and choice.reason


@pytest.mark.parametrize("wanted", [["json"], ["exact_match", "final_answer"]])
def test_a_metric_that_the_references_have_no_form_for_is_refused(wanted):
    with pytest.raises(UserError, match=f"evaluate.metrics: '{wanted[-1]}' needs .* but one is 'Yes.'"):
        scoring.choose_metrics(['{"a": "#### 3"}', "Yes."], wanted)


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
    assert scoring.same(a, b) is equal and scoring.same(b, a) is equal


@pytest.mark.parametrize(
    "reply", ["", "null", "[]", '{"a": 1', '```json\n{"a": 1}\n```', '{"a": Infinity}', "[" * 9999]
)
def test_what_is_not_a_json_object(reply):
    assert scoring.parse_object(reply) is None
    found = scoring.score("json", '{"a": 1, "b": null}', reply)
    assert (found["exact_match"], found["json_valid"]) == (0, 0)
    assert found["fields"] == {
        "a": {"expected": 1, "found": None, "correct": False},
        "b": {"expected": None, "found": None, "correct": False},
    }


def test_a_json_reply_field_by_field():
    expected = {"intent": "refund", "order": "48213", "date": None, "arguments": {"item": {"name": "kettle"}, "n": 2}}
    reply = {"arguments": {"n": 3, "item": {"name": "kettle"}}, "intent": "refund", "order": None, "extra": []}
    found = scoring.score("json", json.dumps(expected), json.dumps(reply))
    assert (found["exact_match"], found["json_valid"]) == (0, 1)
    assert found["fields"] == {
        "intent": {"expected": "refund", "found": "refund", "correct": True},
        "order": {"expected": "48213", "found": None, "correct": False},
        "date": {"expected": None, "found": None, "correct": True},
        "arguments.item.name": {"expected": "kettle", "found": "kettle", "correct": True},
        "arguments.n": {"expected": 2, "found": 3, "correct": False},
        "extra": {"expected": None, "found": [], "correct": False},
    }
    # right: intent, name. found: intent, name, n, extra. expected: intent, order, name, n.
    assert scoring.count_fields(found["fields"]) == (2, 4, 4)


def test_key_order_and_spaces_do_not_matter_but_types_do():
    assert scoring.score("json", '{"a": 1, "b": "x"}', ' {"b":"x","a":1}\n')["exact_match"] == 1
    assert scoring.score("json", '{"a": 1}', '{"a": "1"}')["exact_match"] == 0
    assert scoring.score("json", '{"a": null}', "{}")["exact_match"] == 0


def test_field_table_of_three_replies():
    replies = [
        scoring.score("json", expected, reply)["fields"]
        for expected, reply in [
            ('{"x": "a", "y": 1}', '{"x": "a", "y": 2}'),  # x right; y wrong
            ('{"x": "b", "y": null}', '{"x": null, "y": 5, "z": 1}'),  # x missing; y made up
            ('{"x": "c", "y": null}', '{"x": "c", "y": null}'),  # x right; y rightly null
        ]
    ]
    assert scoring.field_table(replies) == {
        "x": {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "accuracy": 2 / 3, "n": 3},
        "y": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1 / 3, "n": 1},
    }


@pytest.mark.parametrize(
    ("reply", "right"),
    [("2 + 2 = 4\n#### 4", 1), ("#### 4.0", 1), ("#### 5", 0), ("4", 0), ("#### 5\n#### 4.", 1), ("#### 40", 0)],
)
def test_final_answers(reply, right):
    assert scoring.score("final_answer", "It is four.\n#### 4", reply) == {"exact_match": right}


def test_final_answer_ignores_thousands_commas():
    assert scoring.final_answer("#### 1,250") == scoring.final_answer("#### 1250.00") == "1250"
    assert scoring.final_answer("#### -0.50") == "-0.5"


def test_text_is_compared_without_space_around():
    assert scoring.score("text", "Yes.", " Yes.\n") == {"exact_match": 1}
    assert scoring.score("text", "Yes.", "yes.") == {"exact_match": 0}
