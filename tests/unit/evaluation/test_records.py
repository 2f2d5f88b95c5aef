"""Choices as scores.json has them."""

from adder.core.choice import Choice
from adder.evaluation.records import ChoiceRecord, choice_record


def test_a_choice_is_written_with_its_reason_and_alternatives():
    choice = Choice("hf", "as set", [{"backend": "vllm"}])
    assert choice_record(choice) == choice.to_dict() and set(choice.to_dict()) == ChoiceRecord.__required_keys__
