"""A choice goes into files as it is."""

from adder.core.choice import Choice


def test_a_choice_is_plain_data():
    choice = Choice("bf16", "this CPU has AMX", [{"value": "fp32", "seconds": 2.0}])
    assert choice.to_dict() == {
        "value": "bf16",
        "reason": "this CPU has AMX",
        "alternatives": [{"value": "fp32", "seconds": 2.0}],
    }
