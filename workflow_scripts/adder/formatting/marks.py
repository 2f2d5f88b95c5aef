"""Marks that say "don't learn this" on messages and on rows, under the names that other projects use.

OpenAI writes `weight`, axolotl `train`, `training` and `train_detail`, ms-swift `loss` and `loss_scale`, TRL's KTO
`label`, LLaMA-Factory `kto_tag`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from adder.data.field_template import folded
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
WORDS = {
    **dict.fromkeys(("true", "1", "good", "accept", "accepted", "approved", "desirable", "desired", "thumbs_up"), True),
    **dict.fromkeys(("false", "0", "bad", "reject", "rejected", "declined", "undesirable", "undesired"), False),
    "thumbs_down": False,
}
# Names of other marks: what says that a text is learnt, what turns that round, and what says by itself that it isn't.
LEARNING = re.compile("train|learn|loss|weight|supervis")
NEGATION = re.compile("(^|_)(no|not|non|dont|without|disabled?)(_|$)")
LEAVING_OUT = re.compile("(?<!un)mask|ignor|skip|exclud|omit|frozen|freez")
# Names of columns that may judge a reply.
JUDGING = re.compile(
    "(is_|was_|user_|human_)?(good|bad|correct|accept(ed|able)?|approved?|rejected|preferred|chosen|liked?|helpful|winner|won"
    "|passed|safe|unsafe|harm(less|ful)|toxic|hallucinat(ed|ion)|valid|invalid|verified|incorrect|wrong|ratings?|score|grade|reward|quality|review|outcome|status|success(ful)?|succeeded|solved|resolved|evaluation|annotation|thumbs?_?up|thumbs?_?down|thumbs?|feedback|verdict|judge?ment|vote|upvoted?|label)(_by_\\w+)?"
)
# Of these, true says that a reply is not to be learnt.
DISAPPROVING = re.compile(
    ".*(bad|rejected|unsafe|harmful|toxic|hallucinat|invalid|incorrect|wrong|thumbs?_?down|downvote).*"
)
_KNOWN = frozenset(MESSAGE_MARKS)


@lru_cache(4096)
def learns(key: str) -> bool | None:
    """What true under a name says: that a text is learnt or that it isn't; None for a name of something else."""
    if key in LEARNT or key in UNLEARNT:
        return key in LEARNT
    if key in SPANS:
        return None
    name = folded(key)
    if LEAVING_OUT.search(name):
        return False
    return None if not LEARNING.search(name) else NEGATION.search(name) is None


def is_learnt(message: Mapping[str, Any], where: str) -> bool:
    """Whether a reply is to be trained on. Raises Rejected for a mark that is neither yes nor no.

    Of names that aren't among those known, such as `is_trainable` or `skip_loss`, only yes and no are marks.
    """
    learnt = True
    for key, mark in message.items():
        meaning = learns(key) if isinstance(key, str) and mark is not None else None
        if meaning is None:
            continue
        said = _yes_or_no(mark)
        if said is not None:
            learnt = learnt and said == meaning
        elif key in _KNOWN:
            found = repr(mark)[:40] if isinstance(mark, str | int | float) else json_type(mark)
            raise Rejected("a weight or train mark other than 0 and 1", f"{where} has {key}: {found}")
    return learnt


def is_mark(key: str, value: Any) -> bool:
    """Whether a message's key is read as a mark."""
    return key in _KNOWN or (learns(key) is not None and _yes_or_no(value) is not None)


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


def refuse_lists(row: Mapping[str, Any]) -> None:
    """Raise Rejected where a row's mark is a list: one for each message or token, which only these can have."""
    if row.keys().isdisjoint(_ROW_MARKS):
        return
    key = next((key for key in ROW_MARKS if isinstance(row.get(key), list) and row[key]), None)
    if key is not None:
        raise Rejected(
            "a row's mark that is a list",
            f"the column {key}; say it on each message, as `train: false`, or on its parts, as `train_detail`",
        )


def doubtful(row: Mapping[str, Any]) -> str | None:
    """A column that may say that the reply is not to be learnt, and may be something else: a `label` of 0 and 1, true
    or false under a name that may judge a reply or mark it; None where there is none.
    """
    for key in _may_judge(tuple(row)):
        value = row[key]
        if key == JUDGEMENT and verdict(row, key) is not None:
            continue
        judges = isinstance(value, bool) or (isinstance(value, str) and folded(value) in WORDS and not value.isdigit())
        if judges or (key == JUDGEMENT and isinstance(value, int | float) and value in (0, 1, -1)):
            return key
    return None


@lru_cache(1024)
def _may_judge(columns: tuple[str, ...]) -> list[str]:
    known = set(ROW_MARKS) - {JUDGEMENT}
    return [
        name
        for name in columns
        if name not in known and (JUDGING.fullmatch(folded(name)) or (learns(name) is not None and "_" in folded(name)))
    ]


def disapproves(column: str) -> bool:
    """Whether true in a column that may judge a reply says that it is not to be learnt."""
    return learns(column) is False or DISAPPROVING.fullmatch(folded(column)) is not None


def _yes_or_no(mark: Any) -> bool | None:
    if isinstance(mark, bool | int | float):
        return bool(mark) if mark in (0, 1) else None
    words = {"true": True, "1": True, "false": False, "0": False}
    return words.get(mark.strip().lower()) if isinstance(mark, str) else None


def verdict(row: Mapping[str, Any], key: str) -> bool | None:
    """What a row's mark says; None where its value is none."""
    mark = row[key]
    if isinstance(mark, bool):
        return mark
    if key in JUDGEMENTS and isinstance(mark, str):
        return WORDS.get(folded(mark)) if key != JUDGEMENT else {"true": True, "false": False}.get(folded(mark))
    numbers = key in WEIGHTS or (key in JUDGEMENTS and key != JUDGEMENT)
    return mark > 0 if numbers and isinstance(mark, int | float) and mark in (0, 1, -1) else None
