"""Degenerate replies as diagnoses: cut off, empty, in circles, all alike, echoes. Named always, whatever the loss."""

from adder.evaluation.degenerate_replies import ReplyFaults
from adder.training.monitoring.symptoms import Diagnosis, diagnosis

NAMED = 0.05  # of the replies: fewer than that happen to a good model
MOST = 0.5  # of the replies: from here on the model is of no use, and it is a warning
# Name: likely cause, and what to change.
CAUSES = {
    "replies never end": (
        "the end of a turn was not learnt: its token carries no loss, or is another than the one that stops replies",
        "tokenize.chat_template: chatml (whose replies end in the end-of-turn token, with loss)",
    ),
    "empty replies": (
        "generation starts elsewhere than training does, or many training replies are empty",
        "tokenize.chat_template: chatml, and rows without a reply out of data.sources",
    ),
    "replies repeat": (
        "nothing is learnt yet, or steps that were too large broke what the base could do",
        "train.learning_rate: nearer to the usual, or train.epochs: more where the loss still falls",
    ),
    "replies all alike": (
        "the model has learnt the commonest reply and doesn't read the prompt, or it has learnt nothing",
        "data.sources: look whether a reply can be told from its prompt; else train.epochs: more",
    ),
    "replies echo the prompt": (
        "the prompt carries loss too, or training replies stand in their own prompt, so that copying is learnt",
        "tokenize.loss_on: assistant, and rows whose reply says its prompt again out of data.sources",
    ),
}


def reply_symptoms(faults: ReplyFaults | None, step: int | None, what: str, least: float = NAMED) -> list[Diagnosis]:
    """A diagnosis for each fault that at least the share `least` of the replies have; `what` replies those are.

    It is a warning where most replies have it, else a note.
    """
    if faults is None or not faults.replies:
        return []
    counts = (faults.unended, faults.empty, faults.circling, faults.alike, faults.echoing)
    says = (
        *("do not end by themselves", "are empty", "repeat the same words over and over", f"are {faults.alike_as}"),
        "repeat what their prompt says",
    )
    found: list[Diagnosis] = []
    for (name, (cause, change)), count, said in zip(CAUSES.items(), counts, says, strict=True):
        if count and count >= least * faults.replies:
            severity = "warning" if count >= MOST * faults.replies else "note"
            evidence = f"{count:,} of {faults.replies:,} {what} {said}"
            found.append(diagnosis(name, severity, step, evidence, cause, change))
    return found
