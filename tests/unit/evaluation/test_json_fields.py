"""Fields of JSON replies, counted by hand."""

from adder.evaluation.json_fields import compare_fields, count_fields, field_table


def test_a_json_reply_field_by_field():
    expected = {"intent": "refund", "order": "48213", "date": None, "arguments": {"item": {"name": "kettle"}, "n": 2}}
    reply = {"arguments": {"n": 3, "item": {"name": "kettle"}}, "intent": "refund", "order": None, "extra": []}
    found = compare_fields(expected, reply)
    assert found == {
        "intent": {"expected": "refund", "found": "refund", "correct": True},
        "order": {"expected": "48213", "found": None, "correct": False},
        "date": {"expected": None, "found": None, "correct": True},
        "arguments.item.name": {"expected": "kettle", "found": "kettle", "correct": True},
        "arguments.n": {"expected": 2, "found": 3, "correct": False},
        "extra": {"expected": None, "found": [], "correct": False},
    }
    # right: intent, name. found: intent, name, n, extra. expected: intent, order, name, n.
    assert count_fields(found) == (2, 4, 4)


def test_field_table_of_three_replies():
    replies = [
        compare_fields({"x": "a", "y": 1}, {"x": "a", "y": 2}),  # x right; y wrong
        compare_fields({"x": "b", "y": None}, {"x": None, "y": 5, "z": 1}),  # x missing; y made up
        compare_fields({"x": "c", "y": None}, {"x": "c", "y": None}),  # x right; y rightly null
    ]
    assert field_table(replies) == {
        "x": {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "accuracy": 2 / 3, "n": 3},
        "y": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1 / 3, "n": 1},
    }


def test_no_field_of_a_reply_that_is_no_object_is_right():
    assert compare_fields({"a": 1, "b": None}, None) == {
        "a": {"expected": 1, "found": None, "correct": False},
        "b": {"expected": None, "found": None, "correct": False},
    }
