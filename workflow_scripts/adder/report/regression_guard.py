"""The regression guard: whether a run lost more on a task than its settings allow."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

ROUNDING = 1e-9  # a drop of just the allowed size passes, whatever the last bits of two means say


class GuardFinding(TypedDict):
    """guard.json: whether a run lost no more than it may, the tasks in which it did, and both in words."""

    passed: bool
    failed: list[str]
    sentence: str


def check(tasks: Sequence[Mapping[str, Any]]) -> GuardFinding:
    """Judge the tasks of a metrics.json.

    Of each task it reads task, metric, base and tuned ({value, …}), difference ({value, ci95, …}), max_drop and
    higher_is_better; one whose max_drop is None isn't guarded. The measured drop decides, not its interval: a guard
    that waited until it is sure would let everything pass on few questions. The sentence says where the drop may be
    chance, and, of a pass, where a forbidden drop isn't ruled out.
    """
    guarded = [task for task in tasks if task["max_drop"] is not None]
    failed = [task for task in guarded if drop(task) > task["max_drop"] + ROUNDING]
    if failed:
        sentence = " ".join(map(_failure, failed))
    elif guarded:
        sentence = " ".join(map(_pass, guarded))
    else:
        sentence = "No task has a max_drop."
    return {"passed": not failed, "failed": [task["task"] for task in failed], "sentence": sentence}


def drop(task: Mapping[str, Any]) -> float:
    """How much worse the tuned model is than its base, in the metric's own unit; below 0 where it is better."""
    change = task["difference"]["value"]
    return -change if task["higher_is_better"] else change


def _failure(task: Mapping[str, Any]) -> str:
    text = (
        f"{task['task']}: {task['metric']} got worse by {drop(task):.4g}, from {task['base']['value']:.4g} to "
        f"{task['tuned']['value']:.4g}; max_drop allows {task['max_drop']:g}."
    )
    bounds = _bounds(task)
    if bounds[0] > task["max_drop"]:
        return text
    return (
        f"{text} The drop's 95 % interval, {bounds[0]:.4g} to {bounds[1]:.4g}, doesn't rule out an allowed one: "
        "more questions would tell."
    )


def _pass(task: Mapping[str, Any]) -> str:
    text = f"{task['task']}: {task['metric']} fell by {drop(task):.4g} of {task['max_drop']:g} allowed."
    if drop(task) <= 0:
        text = f"{task['task']}: {task['metric']} didn't fall."
    bounds = _bounds(task)
    if bounds[1] <= task["max_drop"]:
        return text
    return f"{text} Its 95 % interval reaches {bounds[1]:.4g}, so that a larger drop isn't ruled out."


def _bounds(task: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % interval of the drop."""
    low, high = task["difference"]["ci95"]
    return (-high, -low) if task["higher_is_better"] else (low, high)
