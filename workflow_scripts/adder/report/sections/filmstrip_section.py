"""The report's view of how the model learnt: its replies to the same prompts, step by step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adder.report import formatting, plots
from adder.report.formatting import GIST
from adder.report.page_section import PageSection, RunReport, View
from adder.report.sections.samples_section import Pieces, clip, mark, reference_text, turn_text
from adder.report.sections.tokens_section import SPECIAL
from adder.training.records import SampleRow

SHOWN_STRIPS = 12
SHOWN_FRAMES = 12  # replies of one prompt; of more evaluations some are left out, evenly


class Frame(NamedTuple):
    """A reply after a step: whether it is right, ended by itself, is the kept model's, and is the one before it again.

    marked, unlike: as samples_section.mark returns them.
    """

    step: int
    right: bool
    finished: bool
    kept: bool
    reply: str
    same: bool
    marked: Pieces
    unlike: bool


class Strip(NamedTuple):
    """The replies to one prompt, step by step."""

    id: str
    gist: str
    prompt: str
    reference: str
    frames: list[Frame]


def view(run: RunReport) -> View:
    """The replies to each sampled prompt, step by step; nothing where the training sampled none."""
    facts = run.facts
    kept = (facts.train.get("kept") or {}).get("value")
    asked = {one.id: one.tuned["prompt"] for one in facts.samples}
    by_prompt: dict[str, list[SampleRow]] = {}
    for row in facts.sampled:
        by_prompt.setdefault(row["id"], []).append(row)
    steps = sorted({row["step"] for row in facts.sampled})
    shown = set(plots.thin(steps, SHOWN_FRAMES)) | ({kept} & set(steps))
    strips = [
        strip([row for row in rows if row["step"] in shown], kept, asked.get(name) or [])
        for name, rows in list(by_prompt.items())[:SHOWN_STRIPS]
    ]
    if not strips:
        return {}
    # What was trained from: the base itself, or the base with an earlier adapter.
    start = "start" if facts.model.get("adapter") else "base"
    return {"strips": strips, "steps": len(steps), "shown": len(shown), "prompts": len(by_prompt), "start": start}


def strip(rows: Sequence[SampleRow], kept: int | None, turns: Sequence[Mapping[str, Any]]) -> Strip:
    """The replies to one prompt, whose messages are `turns` where they are known."""
    frames: list[Frame] = []
    for row in sorted(rows, key=lambda row: row["step"]):
        same = bool(frames) and frames[-1].reply == row["reply"]
        frames.append(frame(row, kept, same))
    first = rows[0]
    return Strip(
        first["id"],
        gist(first["prompt"], turns),
        clip(first["prompt"].strip()),
        reference_text(first["reference"]),
        frames,
    )


def frame(row: SampleRow, kept: int | None, same: bool) -> Frame:
    """One reply as a frame of the strip; `same` as the one before it."""
    right = bool(row["exact_match"])
    marked, unlike = mark(row["reference"], row["reply"], right)
    step, finished = row["step"], row.get("finished", True)
    return Frame(step, right, finished, step == kept, row["reply"], same, marked, unlike)


def gist(prompt: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """What the prompt asks, in one line: its last turn where the evaluation knows it, else its end."""
    if turns:
        return formatting.gist(turn_text(turns[-1]))
    words = " ".join(SPECIAL.sub(" ", prompt).split())
    return words if len(words) <= GIST else f"… {words[-GIST:].partition(' ')[2]}"


SECTION = PageSection(name="filmstrip", anchor="filmstrip", title="Replies while training", view=view)
