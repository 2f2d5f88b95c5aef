"""Degenerate replies become diagnoses: a warning where most are so, a note where few are."""

from adder.evaluation.degenerate_replies import find_faults
from adder.training.monitoring.reply_symptoms import CAUSES, reply_symptoms

REFERENCES = [f"reference {n}" for n in range(40)]


def test_each_fault_has_a_diagnosis_of_its_own():
    found = reply_symptoms(find_faults(["........"] * 40, REFERENCES, [False] * 40), 7, "replies")
    assert [one["name"] for one in found] == ["replies never end", "replies repeat", "replies all alike"]
    assert all(one["severity"] == "warning" and one["step"] == 7 for one in found)
    assert found[0]["evidence"] == "40 of 40 replies do not end by themselves"
    empty = reply_symptoms(find_faults([""] * 30 + REFERENCES[30:], REFERENCES, [True] * 40), None, "replies")
    assert [one["name"] for one in empty] == ["empty replies"] and set(CAUSES) >= {"empty replies"}


def test_few_faults_are_a_note_and_good_replies_nothing():
    cut = reply_symptoms(find_faults(REFERENCES, REFERENCES, [False] * 3 + [True] * 37), None, "replies")
    assert [(one["name"], one["severity"]) for one in cut] == [("replies never end", "note")]
    assert reply_symptoms(find_faults(REFERENCES, REFERENCES, [False] + [True] * 39), None, "replies") == []
    assert reply_symptoms(find_faults([], [], []), None, "replies") == reply_symptoms(None, None, "replies") == []


def test_replies_that_echo_the_prompt_are_named():
    asked = [f"Where is parcel number {n} of mine?" for n in range(40)]
    found = reply_symptoms(find_faults(asked, REFERENCES, [True] * 40, [[one] for one in asked]), None, "replies")
    assert [(one["name"], one["severity"]) for one in found if "echo" in one["name"]] == [
        ("replies echo the prompt", "warning")
    ]
