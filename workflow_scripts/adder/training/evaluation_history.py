"""What the evaluations of a training say: which step was best, and for how long none was better."""

from collections.abc import Mapping, Sequence
from typing import Any


def judged(history: Sequence[Mapping[str, Any]], by: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation in a training's log, higher is better: the loss counts negative."""
    key = {"loss": "eval_loss", "exact_match": "exact_match"}[by]
    return [(row["step"], -row[key] if by == "loss" else row[key]) for row in history if key in row]


def best_step(history: Sequence[Mapping[str, Any]], by: str) -> int | None:
    """The step whose evaluation was best, the earliest of equals; None without evaluations."""
    found = judged(history, by)
    return max(found, key=lambda pair: (pair[1], -pair[0]))[0] if found else None


def evaluations_since_best(history: Sequence[Mapping[str, Any]], by: str) -> int:
    """How many evaluations in a row were no better than the best before them."""
    step = best_step(history, by)
    return sum(other > step for other, _ in judged(history, by)) if step is not None else 0
