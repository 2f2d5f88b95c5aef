"""Marks that say "don't learn this" on messages and on rows, under the names that other projects use.

OpenAI writes `weight`, axolotl `train`, `training` and `train_detail`, ms-swift `loss` and `loss_scale`, TRL's KTO
`label`, LLaMA-Factory `kto_tag`.
"""

from collections.abc import Mapping
from typing import Any

from adder.formatting.rejected import Rejected, json_type

LEARNT = (
    *("weight", "train", "training", "trainable", "trained", "learn", "loss", "loss_weight", "loss_scale"),
    *("loss_mask", "compute_loss", "calculate_loss"),
)  # false or 0: not to be learnt
UNLEARNT = ("masked", "mask", "ignore", "ignored", "no_loss", "no_train")  # true or 1: not to be learnt
SPANS = ("train_detail", "training_detail", "train_details", "loss_spans", "train_spans")  # parts of a message's text
MESSAGE_MARKS = (*LEARNT, *UNLEARNT, *SPANS)

JUDGEMENT = "label"  # in a row: true where its reply is desired
JUDGEMENTS = (JUDGEMENT, "kto_tag", "kto_label", "desirable", "is_desirable", "desired")
WEIGHTS = ("weight", "loss_weight", "loss_scale")  # marks of a row that may be numbers without being marks
ROW_MARKS = (*JUDGEMENTS, *LEARNT, *UNLEARNT)
_ROW_MARKS = frozenset(ROW_MARKS)
WORDS = {"true": True, "false": False}


def is_learnt(message: Mapping[str, Any], where: str) -> bool:
    """Whether a reply is to be trained on. Raises Rejected for a mark that is neither yes nor no."""
    learnt = True
    for key in (*LEARNT, *UNLEARNT):
        mark = message.get(key)
        if mark is None:
            continue
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            found = repr(mark)[:40] if isinstance(mark, str | int | float) else json_type(mark)
            raise Rejected("a weight or train mark other than 0 and 1", f"{where} has {key}: {found}")
        learnt = learnt and bool(mark) != (key in UNLEARNT)
    return learnt


def is_undesired(row: Mapping[str, Any]) -> str | None:
    """The column that says that a row's reply is not to be learnt, or None.

    Numbers count where a name leaves no doubt: 0 in `label` may be a class, and `loss` a measurement.
    """
    if row.keys().isdisjoint(_ROW_MARKS):  # nearly all there are
        return None
    for key in ROW_MARKS:
        if key in row and verdict(row, key) is (key in UNLEARNT):
            return key
    return None


def is_doubtful(row: Mapping[str, Any]) -> bool:
    """Whether a row has a number for a label that may be a judgement or a class."""
    label = row.get(JUDGEMENT)
    return isinstance(label, int | float) and not isinstance(label, bool) and label in (0, 1)


def verdict(row: Mapping[str, Any], key: str) -> bool | None:
    """What a row's mark says; None where its value is none."""
    mark = row[key]
    if isinstance(mark, bool):
        return mark
    if key in JUDGEMENTS and isinstance(mark, str):
        return WORDS.get(mark.strip().lower())
    numbers = key in WEIGHTS or (key in JUDGEMENTS and key != JUDGEMENT)
    return bool(mark) if numbers and isinstance(mark, int | float) and mark in (0, 1) else None
