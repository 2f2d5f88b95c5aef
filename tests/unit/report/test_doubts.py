"""What stands against a "better", and what forbids the word."""

from adder.evaluation.degenerate_replies import find_faults
from adder.report.doubts import NOTHING_LEARNT, find_doubts
from adder.report.scores import with_doubts
from adder.training.monitoring.symptoms import diagnosis

REFERENCES = [f"reference {n}" for n in range(20)]
GOOD = find_faults(REFERENCES, REFERENCES, [True] * 20)
DOTS = find_faults(["........"] * 20, REFERENCES, [False] * 20)
CLEAN = {"found": 6, "dropped": 6}
BETTER = {
    "verdict": "better",
    "sentence": "The tuned model is better than its base: held-out loss went down from 6.7 to 6.5, on 20 rows.",
}


def found(name, severity="warning"):
    return diagnosis(name, severity, None, "", "", "")


def test_a_sound_run_leaves_no_doubt():
    assert find_doubts([found("small batch", "note")], GOOD, CLEAN) == []
    assert with_doubts(BETTER, []) == {**BETTER, "doubts": []}


def test_replies_that_are_none_forbid_the_word_better():
    verdict = with_doubts(BETTER, find_doubts([found("overfitting")], DOTS, CLEAN))
    assert verdict["verdict"] == "can't tell"
    assert verdict["sentence"].startswith(
        "Can't tell whether the tuned model is better than its base: held-out loss went"
    )
    assert "But 20 of 20 tuned replies are cut off, empty, alike, repeat or echo their prompt." in verdict["sentence"]
    assert verdict["doubts"][1] == "the doctor warns of overfitting"


def test_a_training_that_learnt_nothing_forbids_the_word_better():
    for name in NOTHING_LEARNT:
        verdict = with_doubts(BETTER, find_doubts([found(name)], GOOD, CLEAN))
        assert verdict["verdict"] == "can't tell" and name in verdict["sentence"]


def test_other_findings_stand_beside_the_word():
    doubts = find_doubts([found("overfitting")], GOOD, {"found": 6, "dropped": 2})
    verdict = with_doubts(BETTER, doubts)
    assert verdict["verdict"] == "better" and len(verdict["doubts"]) == 2
    assert verdict["sentence"].endswith(
        "To be read with care: the doctor warns of overfitting; 4 training rows are much like held-out ones."
    )


def test_a_worse_model_stays_worse():
    worse = {"verdict": "worse", "sentence": "The tuned model is worse."}
    verdict = with_doubts(worse, find_doubts([], DOTS, CLEAN))
    assert verdict["verdict"] == "worse" and verdict["sentence"] == worse["sentence"] and len(verdict["doubts"]) == 1
