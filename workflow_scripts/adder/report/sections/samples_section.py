"""Which held-out replies the report shows, and how they differ from their references."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from adder.evaluation import metrics
from adder.evaluation.records import SampleRecord
from adder.report import formatting
from adder.report.facts import PairedSample
from adder.report.page_section import PageSection, RunReport, View
from adder.report.sections.data_section import call_text

SHOWN_SAMPLES = 60
LONGEST_TEXT = 4000  # characters of a text that are shown
MOST_DIFFED = 1200  # words of a text that are compared: the comparison is quadratic
clip = partial(formatting.clip, most=LONGEST_TEXT)
UNLIKE = 0.5  # below this share of common words, marking differences would mark nearly everything
# What stands beside a reply: the scores that it may have in part, and the loss.
BESIDE = [
    *(
        (name, score.label, formatting.percent)
        for name, score in metrics.SCORES.items()
        if isinstance(score, metrics.ReplyScore) and not score.zero_or_one
    ),
    ("loss", "loss", formatting.number),
]
# Words, numbers and dates whole; spaces; any other sign by itself.
WORD = re.compile(r"\w+(?:[.,:/\-]\w+)*|\s+|[^\w\s]")


Kind = Literal["same", "wrong", "missing"]
Pieces = list[tuple[Kind, str]]
"""A reply in pieces: "same", "wrong" (stands in the reply only), "missing" (stands in the reference only)."""


class ShownReply(NamedTuple):
    """A reply: whether it is right, its scores in words, and as `mark` returns it."""

    right: bool
    scores: list[str]
    marked: Pieces
    unlike: bool


class ShownSample(NamedTuple):
    """A held-out row as the page shows it; order: its place in the data; gain: nats a token less than the base."""

    id: str
    order: int
    loss: float | None
    gain: float
    turns: list[View]
    gist: str
    reference: str
    base: ShownReply
    tuned: ShownReply


def view(run: RunReport) -> View:
    """Some of the replies, the worst first."""
    return select_samples(run.facts.samples, SHOWN_SAMPLES)


def select_samples(samples: Sequence[PairedSample], most: int) -> View:
    """Choose at most `most` samples, the tuned model's worst first, and prepare them for the page.

    Wrong replies come first, lowest chrF or highest loss first; a third of the places stays for right ones where there
    are any.
    Plain texts have no replies and are left out. Returns {shown, total, wrong, right, system (the system prompt that
    all share, or None), rows}.
    """
    samples = [sample for sample in samples if sample.tuned["reply"] is not None]
    worst_first = sorted(samples, key=lambda sample: (sample.tuned.get("chrf", 0.0), -(sample.tuned["loss"] or 0.0)))
    wrong = [sample for sample in worst_first if not sample.tuned.get("exact_match")]
    right = [sample for sample in worst_first if sample.tuned.get("exact_match")]
    places = max(most - len(right), most - most // 3)
    chosen = wrong[:places]
    chosen += right[: most - len(chosen)]
    order = {sample.id: number for number, sample in enumerate(samples)}
    system = shared_system(samples)
    return {
        "rows": [prepare(sample, order[sample.id], system) for sample in chosen],
        "shown": len(chosen),
        "total": len(samples),
        "wrong": len(wrong),
        "right": len(right),
        "system": system,
    }


def prepare(sample: PairedSample, order: int, system: str | None) -> ShownSample:
    """One sample as the page shows it: turns, and reference, base and tuned as marked texts."""
    base, tuned = sample.base, sample.tuned
    turns = [turn for turn in tuned["prompt"] if not (turn["role"] == "system" and turn["content"] == system)]
    return ShownSample(
        id=sample.id,
        order=order,
        loss=tuned.get("loss"),
        gain=(base.get("loss") or 0.0) - (tuned.get("loss") or 0.0),
        turns=[{"role": turn["role"], "content": clip(turn_text(turn))} for turn in turns],
        gist=formatting.gist(turn_text(turns[-1]) if turns else ""),
        reference=reference_text(tuned["reference"]),
        base=_reply(tuned["reference"], base),
        tuned=_reply(tuned["reference"], tuned),
    )


def _reply(reference: str, row: SampleRecord) -> ShownReply:
    right = bool(row.get("exact_match"))
    marked, unlike = mark(reference, row["reply"] or "", right)
    scores = [f"{name} {show(value)}" for key, name, show in BESIDE if (value := row.get(key)) is not None]
    return ShownReply(right, scores, marked, unlike)


def reference_text(reference: str) -> str:
    """A reference as it is shown: JSON indented."""
    data = as_data(reference)
    return clip(reference if data is None else pretty(data))


def turn_text(turn: Mapping[str, Any]) -> str:
    """What a message says: its text, and the tools that it calls."""
    return "\n".join(filter(None, [turn["content"], *map(call_text, turn.get("tool_calls") or [])]))


def mark(reference: str, reply: str, right: bool) -> tuple[Pieces, bool]:
    """Return the reply as (kind, text) pieces, and whether it is too unlike the reference to be compared word by word.

    JSON is compared indented and with the reference's order of keys, for order is no difference.
    """
    expected, found = as_data(reference), as_data(reply)
    if expected is not None and found is not None:
        reference, reply = pretty(expected), pretty(in_order_of(found, expected))
    if right or not reply:
        return [("same", clip(reply))], False
    left, right_words = WORD.findall(clip(reference))[:MOST_DIFFED], WORD.findall(clip(reply))[:MOST_DIFFED]
    matcher = difflib.SequenceMatcher(None, left, right_words, autojunk=False)
    if likeness(matcher.get_matching_blocks(), left, right_words) < UNLIKE:
        return [("same", clip(reply))], True
    pieces: Pieces = []
    for _, from_left, to_left, from_right, to_right in matcher.get_opcodes():
        if left[from_left:to_left] == right_words[from_right:to_right]:
            pieces.append(("same", "".join(left[from_left:to_left])))
            continue
        pieces.append(("missing", "".join(left[from_left:to_left])))
        pieces.append(("wrong", "".join(right_words[from_right:to_right])))
    return [(kind, text) for kind, text in pieces if text], False


def likeness(blocks: Sequence[difflib.Match], left: list[str], right: list[str]) -> float:
    """Share of the words of both texts that they have in common; spaces, which all texts share, do not count."""
    words = sum(not word.isspace() for word in left + right)
    common = sum(not word.isspace() for block in blocks for word in left[block.a : block.a + block.size])
    return 2 * common / words if words else 1.0


def as_data(text: str) -> Any:
    """The JSON object or list that `text` is, else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def pretty(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def in_order_of(value: Any, like: Any) -> Any:
    """The same data with the keys of objects in the order in which `like` has them, others behind."""
    if isinstance(value, dict) and isinstance(like, dict):
        keys = [key for key in like if key in value] + [key for key in value if key not in like]
        return {key: in_order_of(value[key], like.get(key)) for key in keys}
    if isinstance(value, list) and isinstance(like, list):
        return [in_order_of(one, like[n] if n < len(like) else None) for n, one in enumerate(value)]
    return value


def shared_system(samples: Sequence[PairedSample]) -> str | None:
    """The system prompt, where all samples begin with the same one."""
    first = [sample.tuned["prompt"][0] if sample.tuned["prompt"] else None for sample in samples]
    found = {turn["content"] for turn in first if turn and turn["role"] == "system"}
    everywhere = all(turn and turn["role"] == "system" for turn in first)
    return found.pop() if everywhere and len(found) == 1 else None


SECTION = PageSection(name="samples", anchor="replies", title="Replies", view=view)
