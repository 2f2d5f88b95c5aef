"""What the comparison of runs knows: every run's figures side by side, which is best, and how sure that is.

Runs are compared with the best one over the same held-out rows, row by row where they have the same rows
(E. Miller, "Adding Error Bars to Evals", arXiv:2411.00640). Picking the best one by its score and then testing it
against all others finds differences where there are none: of twelve equally good runs, one is significantly worse than
the luckiest in a sixth of all tries, although each p is multiplied by eleven. So a p is multiplied by the number of
pairs among the runs that are still in question, from the smallest p on, which is Holm's method over all pairs (S. Holm,
Scandinavian Journal of Statistics 6 (1979) 65) with the pairs left out that can't be alike any more (J. P. Shaffer,
Journal of the American Statistical Association 81 (1986) 826). The best of two is tested as it is.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from adder.core import intervals
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.evaluation.metrics import SCORES
from adder.report.scores import per_row

# Settings that only say how things are called.
NAMES = ("report.title",)
CURVES = ("loss", "eval_loss")


def compare(runs: dict[str, dict[str, Path]]) -> dict:
    """Return the whole comparison of `runs` (run: {stage: folder}), the best run first.

    {metric, paired (None for one run), rows (how many held-out rows, None where runs differ in them), runs: [{name,
    rank, score, scores, base, verdict, tasks, guard, findings, against_best, settings, cost, steps, model (its files'
    digests), curves}], verdict, differing: {"set": [keys], "chosen": [keys]}}.
    Raises UserError where a file is missing or the runs have no score in common.
    """
    loaded = [load(name, folders) for name, folders in runs.items()]
    metric = main_metric(loaded)
    for run, folders in zip(loaded, runs.values(), strict=True):
        run["score"] = run["scores"][metric]
        run["rows"] = held_out(metric, folders["evaluate_tuned"] / "samples.jsonl")
    ranked = rank(loaded, metric)
    best = ranked[0]
    for run in ranked[1:]:
        run["against_best"] = difference(best["rows"], run["rows"], run["score"]["value"] - best["score"]["value"])
    judge_differences([run["against_best"] for run in ranked[1:]])
    paired = all(run["against_best"]["paired"] for run in ranked[1:]) if len(ranked) > 1 else None
    same_rows = all(run["rows"]["items"] == best["rows"]["items"] for run in ranked)
    found = {
        "metric": metric,
        "paired": paired,
        "rows": len(best["rows"]["items"]) if same_rows else None,
        "runs": [{name: value for name, value in run.items() if name != "rows"} for run in ranked],
        "differing": differing(ranked),
    }
    return found | {"verdict": verdict(found)}


def load(name: str, folders: dict[str, Path]) -> dict:
    """Read what one run's stages left for the comparison."""
    metrics = _read(folders["report"] / "metrics.json", read_json)
    record = _read(folders["report"] / "run.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8")))
    train = _read(folders["train"] / "train.json", read_json)
    curve = _read(folders["train"] / "metrics.jsonl", lambda path: list(read_jsonl(path)))
    merged = _read(folders["merge"] / "stage.json", read_json)["outputs"]
    return {
        "name": name,
        "scores": _scores(metrics["heldout"], "tuned"),
        "base": _scores(metrics["heldout"], "base"),
        "verdict": metrics["verdict"],
        "tasks": {task["task"]: task["tuned"] | {"metric": task["metric"]} for task in metrics["tasks"]},
        "guard": metrics["guard"],
        "findings": metrics["doctor"] or [],
        "settings": record["settings"],
        "cost": cost(metrics["cost"]),
        "steps": train["steps"],
        "model": {path: file["digest"] for path, file in merged.items() if path.startswith("model/")},
        "curves": {key: [(row["step"], row[key]) for row in curve if _number(row.get(key))] for key in CURVES},
        "against_best": None,
    }


def cost(found: dict) -> dict:
    """Seconds of all of a run's stages, shared ones counted in full, and their price: {seconds, price, currency}."""
    price = found["price"] or {}
    return {"seconds": found["total_seconds"], "price": price.get("value"), "currency": price.get("currency")}


def main_metric(runs: Sequence[dict]) -> str:
    """The score that decides: one that a run's own verdict is about and that all runs have, the report's first of such.

    Raises UserError where the runs have no score in common.
    """
    common = [metric for metric in SCORES if all(metric in run["scores"] for run in runs)]
    if not common:
        raise UserError(
            "compare: the runs have no held-out score in common: "
            + "; ".join(f"{run['name']} has {', '.join(run['scores']) or 'none'}" for run in runs)
        )
    asked = [metric for metric in common if any(run["verdict"]["metric"] == metric for run in runs)]
    return (asked or common)[0]


def held_out(metric: str, path: Path) -> dict:
    """One value a held-out row, in the order of their ids.

    {items: [(id, digest of the reference)], values: float64 (rows,) or None, groups: each row's or None, tokens:
    labelled tokens a row}. Texts without a reply to judge have just a loss. `values` is None where rows don't have this
    score one by one.
    """
    rows = [row for row in _read(path, lambda path: list(read_jsonl(path))) if metric == "loss" or _replied(row)]
    rows.sort(key=lambda row: row["id"])
    return {
        "items": [(row["id"], hashlib.blake2b(str(row["reference"]).encode()).hexdigest()) for row in rows],
        "values": per_row(metric, rows),
        "groups": intervals.clusters_of(rows),
        "tokens": [row.get("labelled_tokens") for row in rows] if metric == "loss" else None,
    }


def rank(runs: Sequence[dict], metric: str) -> list[dict]:
    """The runs, best first; of equals the cheaper one. Runs that fell too far in a guarded task come last."""
    sign = -1 if SCORES[metric].better == "higher" else 1
    order = sorted(
        runs,
        key=lambda run: (refused(run), sign * run["score"]["value"], run["cost"]["seconds"], run["name"]),
    )
    for place, run in enumerate(order, 1):
        run["rank"] = place
    return order


def difference(best: dict, other: dict, value: float) -> dict:
    """Score of `other` less that of `best` with its 95 % interval: {value, ci95, p, paired, comparable, needed_n}.

    Paired by row where both have the same rows, else as of two independent samples. `comparable` is false for losses
    per token where the same replies have other numbers of tokens: those are in different units.
    """
    unknown = {"value": value, "ci95": None, "p": 1.0, "paired": False, "comparable": True, "needed_n": None}
    if best["values"] is None or other["values"] is None:
        return unknown
    same = best["items"] == other["items"]
    if same and best["tokens"] != other["tokens"]:
        return unknown | {"comparable": False}
    if same:
        found = intervals.paired_difference(best["values"], other["values"], best["groups"])
        needed = intervals.needed_n(other["values"] - best["values"], best["groups"])
        paired = {"value": found["value"], "ci95": found["ci95"], "p": small_p(found), "paired": True}
        return unknown | paired | {"needed_n": needed}
    return unknown | independent(best, other)


def small_p(found: dict) -> float:
    """The p of a paired difference, beyond what drawing signs can show: there the normal distribution's.

    Ten thousand draws have no p below 1e-4, too much to be multiplied by the pairs of many runs.
    """
    floor = 1 / (intervals.RESAMPLES + 1)
    if not math.isclose(found["p"], floor):
        return found["p"]
    return min(floor, normal_p(found["value"], found["stderr"]))


def normal_p(value: float, error: float) -> float:
    """Two-sided p of a value with this standard error."""
    return math.erfc(abs(value) / error / math.sqrt(2)) if error else float(value == 0)


def independent(best: dict, other: dict) -> dict:
    """Difference of two means of different rows, of what `held_out` returned, with the normal 95 % interval: {value,
    ci95, p}.

    With fewer than two rows on a side there is no interval.
    """
    value = float(other["values"].mean() - best["values"].mean())
    if min(len(best["values"]), len(other["values"])) < 2:
        return {"value": value}
    error = math.hypot(*(intervals.standard_error(run["values"], run["groups"]) for run in (best, other)))
    half = intervals.Z95 * error
    return {"value": value, "ci95": [value - half, value + half], "p": normal_p(value, error)}


def judge_differences(differences: Sequence[dict]) -> None:
    """Add to the differences from the best run `p_corrected`, and `sure`: below 0.05, and the interval leaves out 0."""
    order = sorted(differences, key=lambda one: one["p"])
    highest = 0.0
    for place, one in enumerate(order):
        left = len(order) + 1 - place
        highest = max(highest, min(1.0, one["p"] * left * (left - 1) / 2))
        low, high = one["ci95"] or (0.0, 0.0)
        one["p_corrected"] = highest
        one["sure"] = highest < 0.05 and (low > 0 or high < 0)


def verdict(found: dict) -> dict:
    """Which run to use: {word, run, rivals, tied, same_model, cheapest, needed_n}.

    `word`: "one" run only; "best", surely better than all others; "can't tell" it from its `rivals`; "refused", where
    every run fell too far in a guarded task. `tied`: the rivals that score the same, and `same_model` those of them
    whose merged model is the best's, byte for byte. `cheapest`: the run that took least time, of the best and its
    rivals where there are any, else of all. `needed_n`: rows that would tell the best from the first rival, None where
    that can't be said.
    """
    best, *others = found["runs"]
    rivals = [run for run in others if not run["against_best"]["sure"] and not refused(run)]
    tied = [run for run in rivals if math.isclose(run["score"]["value"], best["score"]["value"], rel_tol=1e-9)]
    word = "refused" if refused(best) else "one" if not others else "can't tell" if rivals else "best"
    # Of runs that took the same time the better one, for they are in order and min takes the first.
    cheapest = min([best, *(rivals or others)], key=lambda run: run["cost"]["seconds"])
    return {
        "word": word,
        "run": best["name"],
        "rivals": [run["name"] for run in rivals],
        "tied": [run["name"] for run in tied],
        "same_model": [run["name"] for run in tied if run["model"] == best["model"]],
        "cheapest": cheapest["name"],
        "needed_n": rivals[0]["against_best"]["needed_n"] if rivals and not tied else None,
    }


def differing(runs: Sequence[dict]) -> dict[str, list[str]]:
    """The keys of settings that are not the same in all runs: `set` by people, and `chosen` by stages in every run."""
    keys = dict.fromkeys(key for run in runs for key in run["settings"] if key not in NAMES)
    found: dict[str, list[str]] = {"set": [], "chosen": []}
    for key in keys:
        rows = [run["settings"].get(key) for run in runs]
        values = [row and row["value"] for row in rows]
        if any(value != values[0] for value in values):
            found["chosen" if all(row is None or row["from"] == "chosen" for row in rows) else "set"].append(key)
    return found


def value_of(run: dict, key: str) -> Any:
    """A run's value of a setting; None where it has no such setting."""
    return (run["settings"].get(key) or {}).get("value")


def refused(run: dict) -> bool:
    """Whether a run lost more than it may in a guarded task."""
    return bool(run["guard"]) and not run["guard"]["passed"]


def _scores(heldout: dict, who: str) -> dict[str, dict]:
    """The scores of base or tuned by metric; one that isn't finite can't be compared."""
    found = {metric: heldout.get(metric, {}).get(who) for metric in SCORES}
    return {metric: score for metric, score in found.items() if score and score["value"] is not None}


def _replied(row: dict) -> bool:
    return row.get("reply") is not None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path, how: Callable[[Path], Any]) -> Any:
    try:
        return how(path)
    except FileNotFoundError:
        raise UserError(f"compare: {path} is missing; its stage did not finish, or an older version wrote it") from None
