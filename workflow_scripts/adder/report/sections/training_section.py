"""The report's view of the training: curves, figures, evaluations on the way, the look before the start."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from adder.report import plots
from adder.report.facts import RunFacts
from adder.report.formatting import duration, number, percent, size
from adder.report.page_section import Figure, PageSection, RunReport, View
from adder.report.sections.choices_section import table
from adder.report.sections.doctor_section import with_settings
from adder.training import evaluation_history
from adder.training.records import TrainRecord


class Curve(NamedTuple):
    """A plot of the training; `legend`: (name, CSS class) of its curves where there are several."""

    title: str
    unit: str
    plot: str
    legend: list[tuple[str, str]]


class EvaluationRow(NamedTuple):
    """An evaluation while training; `loss`: the median of the ten steps up to it."""

    step: int
    loss: float | None
    eval_loss: float | None
    exact_match: float | None


class Piece(NamedTuple):
    """A stretch of the first pack: whether it carries loss, and whether it begins an example."""

    text: str
    on: bool
    new: bool


def view(run: RunReport) -> View:
    """Curves, key figures, evaluations as a table, which step's weights were kept, and what was seen beforehand."""
    facts = run.facts
    kept = facts.train.get("kept")
    return {
        "figures": figures(facts),
        "curves": [one for one in curves(facts) if one.plot],
        "evaluations": evaluation_rows(facts),
        "kept": kept and {"step": kept["value"], "reason": with_settings(kept["reason"])},
        "resumed": facts.train.get("resumed_from"),
        "preflight": preflight(facts),
        "products": frozen_products(facts),
    }


def figures(facts: RunFacts) -> list[Figure]:
    """Key figures as (name, value, note)."""
    train = facts.train
    batch = train.get("effective_batch") or {}
    share = train["trainable_parameters"] / train["total_parameters"] if train.get("total_parameters") else None
    tokens, planned = train.get("tokens_per_epoch"), train.get("planned_steps") or train["steps"]
    took = facts.records["train"]
    attempted = f" in {attempts} attempts" if (attempts := took.get("attempts")) else ""
    # The stage also loads, evaluates and samples: tokens by time would be another rate.
    rate = f"whole stage{attempted}; {number(train.get('tokens_per_second'))} tokens/s within a step"
    stopped = f"of {planned:,} planned; " if planned > train["steps"] else ""
    return [
        ("Steps", f"{train['steps']:,}", stopped + epochs(train)),
        ("Time", duration(took.get("seconds")), rate),
        ("Tokens", f"{tokens:,}" if tokens else "–", "an epoch"),
        ("Loss", f"{number(train.get('first_loss'))} → {number(train.get('final_loss'))}", _losses_of(train["steps"])),
        ("Trained parameters", f"{train['trainable_parameters']:,}", f"{percent(share)} of the model"),
        (
            "Effective batch",
            number(batch.get("mean_examples")),
            f"examples a step, asked: {batch.get('asked', '–')}",
        ),
    ]


def _losses_of(steps: int) -> str:
    """Which steps' losses train.json has as the first and the final one."""
    return f"first step and mean of the last {min(10, steps)}" if steps > 1 else "the one step"


def epochs(train: TrainRecord) -> str:
    """The passes over the data, in words."""
    return f"{number(train['epochs'])} {'epoch' if train['epochs'] == 1 else 'epochs'}"


def curves(facts: RunFacts) -> list[Curve]:
    """The plots; `plot` is "" where there is nothing to draw."""
    marks = step_marks(facts)
    losses = [plots.Series("loss", "tuned", points(facts, "loss"))]
    if evaluated := points(facts, "eval_loss"):
        losses.append(plots.Series("held-out loss", "heldout", evaluated, dots=True))
    exact = [plots.Series("exact match", "heldout", sampled_matches(facts), dots=True)]
    asked = len({row["id"] for row in facts.sampled})
    replies = f"of {asked} sampled {'reply' if asked == 1 else 'replies'}" if asked else "of the sampled replies"
    unmarked = [mark for mark in marks if mark.kind != "found"]
    whole_percent = partial(percent, digits=0)
    drawn = [
        _curve("Loss", "nats per labelled token", losses, number, adapt=True, marks=marks),
        _curve("Exact match", replies, exact, whole_percent, high=1.0, marks=unmarked),
    ]
    for name, label, unit in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Throughput", "tokens per second"),
    ):
        series = [plots.Series(label.lower(), "plain", points(facts, name))]
        drawn.append(_curve(label, unit, series, number, adapt=name == "grad_norm"))
    return drawn


def _curve(title: str, unit: str, series: Sequence[plots.Series], show: Callable[[float], str], **how: Any) -> Curve:
    plot = plots.lines(series, x_name="step", show=show, label=f"{title} by training step", **how)
    return Curve(title, unit, plot, [(one.name, one.kind) for one in series] if len(series) > 1 else [])


def points(facts: RunFacts, name: str) -> list[tuple[int, float]]:
    """(step, value) of each row of the metrics that has it."""
    return [(row["step"], value) for row in facts.curve if (value := row.get(name)) is not None]


def sampled_matches(facts: RunFacts) -> list[tuple[int, float]]:
    """(step, share of the sampled replies that were right), the base's at step 0 among them."""
    by_step: dict[int, list[float]] = {}
    for row in facts.sampled:
        by_step.setdefault(row["step"], []).append(row["exact_match"])
    found = dict(points(facts, "exact_match"))
    return sorted((found | {step: sum(right) / len(right) for step, right in by_step.items()}).items())


def best_step(facts: RunFacts) -> int | None:
    """The step whose evaluation was best by `train.best_by`; None without evaluations."""
    return evaluation_history.best_step(facts.curve, facts.records["train"]["settings"]["best_by"])


def step_marks(facts: RunFacts) -> list[plots.Mark]:
    """The steps that a curve points out: best, kept, and where a diagnosis shows."""
    kept = (facts.train.get("kept") or {}).get("value")
    named: dict[int, list[tuple[str, str]]] = {}
    wanted = [("best", "best", best_step(facts)), ("kept", "kept", kept)]
    wanted += [("found", one["name"], one["step"]) for one in facts.diagnoses]
    for kind, name, step in wanted:
        if step is not None:
            named.setdefault(step, []).append((kind, name))
    marks = []
    for step, names in sorted(named.items()):
        found = [name for kind, name in names if kind == "found"]
        words = [name for kind, name in names if kind != "found"]
        words += found if len(found) < 3 else [f"{len(found)} findings"]
        marks.append(plots.Mark(step, names[0][0], f"{', '.join(words)}: step {step:,}"))
    return marks


def evaluation_rows(facts: RunFacts) -> list[EvaluationRow]:
    """One row an evaluation."""
    losses, held, right = points(facts, "loss"), dict(points(facts, "eval_loss")), dict(sampled_matches(facts))
    rows = []
    for step in sorted(held.keys() | right.keys()):
        recent = [loss for at, loss in losses if at <= step][-10:]
        loss = sorted(recent)[len(recent) // 2] if recent else None
        rows.append(EvaluationRow(step, loss, held.get(step), right.get(step)))
    return rows


def preflight(facts: RunFacts) -> View | None:
    """What was seen before the first step: {figures, pieces, first, tokens}."""
    seen = facts.train.get("preflight")
    if not seen:
        return None
    dead, took = len(seen["layers_without_gradient"]), facts.records["train"].get("seconds")
    labelled, guessing = seen["labelled"], number(seen["ln_vocabulary"])
    expected = f"roughly {duration(seen['estimated_seconds'])}"
    rows = [
        ("Carry loss", percent(seen["labelled_share"]), f"{labelled:,} of the first pack's {seen['tokens']:,} tokens"),
        ("Loss of the base", number(seen["base_loss"]), f"on that pack; blind guessing: {guessing}"),
        ("Layers reached", f"{seen['layers'] - dead:,} of {seen['layers']:,}", "get a gradient from that pack"),
        ("Time expected", expected, f"for the steps; the whole stage took {duration(took)}"),
    ]  # fmt: skip
    for name, label in (("checkpoints", "Disk for checkpoints"), ("merged_model", "Disk for the merged model")):
        room = seen["disk"][name]
        rows.append((label, size(room["needed_bytes"]), f"of {size(room['free_bytes'])} free"))
    pieces, examples = seen["batch"]["pieces"], [piece.get("example") for piece in seen["batch"]["pieces"]]
    return {
        "figures": rows,
        "pieces": [
            Piece(piece["text"], bool(piece["loss"]), before != after)
            for piece, before, after in zip(pieces, examples[:1] + examples, examples, strict=False)
        ],
        "first": seen["batch"]["from"],
        "tokens": seen["batch"]["tokens"],
    }


def frozen_products(facts: RunFacts) -> View | None:
    """How fp8 compared with bf16 before training, taken, left or set: the sentence and the figures."""
    choice = facts.plan.get("frozen_products")
    if not choice or not choice["alternatives"]:
        return None
    return {"reason": choice["reason"], "table": table(choice["alternatives"], "products", choice["value"])}


SECTION = PageSection(name="training", anchor="training", title="Training", view=view)
