"""What stands against a good verdict: findings of the doctor, degenerate replies, rows that were seen in training."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from adder.evaluation.degenerate_replies import ReplyFaults
from adder.formatting.records import OverlapFindings
from adder.training.monitoring.reply_symptoms import CAUSES, MOST
from adder.training.monitoring.symptoms import Diagnosis

# Findings after which the training has changed nothing that a score could be better by.
NOTHING_LEARNT = frozenset(
    {"loss flat", "labels masked", "nothing trainable", "gradient vanishes", "loss not a number"}
)

FAULTY = "tuned replies are cut off, empty, alike, repeat or echo their prompt"


class Doubt(NamedTuple):
    """A reason, as a clause, and whether with it no model is called better, whatever its score."""

    text: str
    forbids: bool


def find_doubts(diagnoses: Sequence[Diagnosis], faults: ReplyFaults, overlap: OverlapFindings) -> list[Doubt]:
    """All doubts, those that forbid a "better" first. `faults`: of the tuned model's replies to the held-out rows."""
    return sorted(_doubts(diagnoses, faults, overlap), key=lambda doubt: not doubt.forbids)


def _doubts(diagnoses: Sequence[Diagnosis], faults: ReplyFaults, overlap: OverlapFindings) -> Iterator[Doubt]:
    if faults.share >= MOST:
        yield Doubt(f"{faults.faulty:,} of {faults.replies:,} {FAULTY}", True)
    serious = [one for one in diagnoses if one["severity"] in ("stop", "warning")]
    learnt = [one["name"] for one in serious if one["name"] in NOTHING_LEARNT]
    others = [one["name"] for one in serious if one["name"] not in NOTHING_LEARNT | CAUSES.keys()]
    if learnt:
        yield Doubt(f"the doctor finds that nothing was learnt ({', '.join(learnt)})", True)
    if others:
        yield Doubt(f"the doctor warns of {', '.join(others)}", False)
    if stay := overlap["found"] - overlap["dropped"]:
        yield Doubt(f"{stay:,} training rows are much like held-out ones", False)
