"""What the page's first screen has beside the verdict: three telling replies, and what to do next."""

from collections.abc import Sequence
from typing import NamedTuple

from adder.core import intervals
from adder.evaluation.metrics import SCORES, ReplyScore
from adder.report.facts import PairedSample
from adder.report.formatting import clip, gist
from adder.report.run_metrics import Metrics
from adder.report.sections.samples_section import turn_text
from adder.training.monitoring.symptoms import Diagnosis

SHOWN = 180  # characters of a reply


class TellingReply(NamedTuple):
    """A held-out prompt's beginning, and both replies to it; right: whether they match the reference, None for texts
    that are compared otherwise.
    """

    why: str
    prompt: str
    base: str
    tuned: str
    base_right: bool | None
    tuned_right: bool | None


def telling(samples: Sequence[PairedSample], metric: str) -> list[TellingReply]:
    """The reply that the training has changed most for the better, the middle one, and the one that went worst.

    By how much the score `metric` rose from base to tuned; among equals, or where no reply has it by itself, by how
    much the loss fell.
    """
    own = isinstance(SCORES.get(metric), ReplyScore)
    replied = [sample for sample in samples if sample.tuned["reply"] is not None and sample.base["reply"] is not None]

    def gain(sample: PairedSample) -> tuple[float, float]:
        base, tuned = sample.base, sample.tuned
        score = float(tuned.get(metric) or 0) - float(base.get(metric) or 0) if own else 0.0
        return score, (base.get("loss") or 0.0) - (tuned.get("loss") or 0.0)

    order = sorted(replied, key=gain, reverse=True)
    if len(order) < 3:
        return [_shown("", sample) for sample in order]
    first, last = order[0], order[-1]
    places = {
        "most gained" if gain(first) > (0, 0) else "unchanged" if gain(first) == (0, 0) else "least lost": first,
        "in the middle": order[len(order) // 2],
        "least gained" if gain(last) >= (0, 0) else "most lost": last,
    }
    return [_shown(why, sample) for why, sample in places.items()]


def _shown(why: str, sample: PairedSample) -> TellingReply:
    asked = [turn for turn in sample.tuned["prompt"] if turn["role"] != "system"]
    base, tuned = (" ".join((own["reply"] or "").split()) for own in (sample.base, sample.tuned))
    rights = [bool(own["exact_match"]) if "exact_match" in own else None for own in (sample.base, sample.tuned)]
    prompt = gist(turn_text(asked[-1])) if asked else ""
    return TellingReply(why, prompt, clip(base, SHOWN), clip(tuned, SHOWN), *rights)


class Step(NamedTuple):
    """Something to do, and the command or setting for it."""

    text: str
    code: str


def next_steps(run: str, metrics: Metrics, diagnoses: Sequence[Diagnosis], wrong: int) -> list[Step]:
    """What to do next, the most pressing first. `wrong`: tuned replies that differ from their reference."""
    verdict = metrics["verdict"]
    steps = [
        Step(f"The doctor found: {one['name']}. Change it and run again", one["change"])
        for one in diagnoses
        if one["severity"] != "note"
    ][:1]
    if metrics["guard"] and not metrics["guard"]["passed"]:
        steps.append(Step("Keep what the guard found lost: a gentler training, or rows of that kind", "evaluate.tasks"))
    if verdict["verdict"] == "can't tell" and verdict["needed_n"] and not verdict["doubts"]:
        small = abs(verdict["difference"]) < verdict["smallest_difference"]
        size = "the smallest difference that matters" if small else "a difference of this size"
        rows = f"{intervals.round_up(verdict['needed_n']):,}"
        steps.append(Step(f"Hold out more rows: about {rows} would tell {size}", "data.heldout"))
    if verdict["verdict"] in ("worse", "no difference"):
        steps.append(
            Step("Try a gentler training, or more rows like those held out", "train.learning_rate, train.epochs")
        )
    if wrong:
        steps.append(Step(f"Read the {wrong:,} replies that differ from their reference, below under Replies", ""))
    steps.append(Step("Talk to both models", f"adder chat results/{run} --both"))
    return steps[:3]
