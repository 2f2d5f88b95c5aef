"""The report's view of the evaluation: scores with their intervals, fields, tasks and the guard, a judge's verdict."""

from adder.core.intervals import word
from adder.evaluation.metrics import SCORES
from adder.report import plots, regression_guard
from adder.report.formatting import clip, gist, number, percent
from adder.report.samples_section import mark, reference_text, turn_text

LONGEST_TEXT = 1500  # characters of a task's or judgement's text that are shown
SHOWN_LOSSES = 4  # documents of a task at which the tuned model did worse
SHOWN_JUDGEMENTS = 9
# How a pair of replies fared, in the order in which a doubting reader wants to see them.
OUTCOMES = {
    "loss": ("base preferred", "bad"),
    "inconsistent": ("order decides", "unsure"),
    "tie": ("tie", "calm"),
    "win": ("tuned preferred", "good"),
}


def evaluation_section(facts: dict, metrics: dict) -> dict:
    """Scores in numbers, fields, tasks, judge, and how the replies came about."""
    tuned = facts["evaluate_tuned"]
    return {
        "scores": score_rows(metrics["heldout"]),
        "chosen": (tuned.get("metrics") or {}).get("reason"),
        "rows": len(facts["samples"]),
        "groups": metrics["verdict"]["groups"],
        "heldout": metrics["data"]["heldout"],
        "generation": {who: facts[f"evaluate_{who}"].get("generation") for who in ("base", "tuned")},
        "limit": tuned.get("max_new_tokens"),
        "fields": fields_section(metrics["fields"]),
        "tasks": tasks_section(facts["tasks"], metrics["tasks"]),
        "guard": metrics["guard"] and regression_guard.check(metrics["tasks"])["sentence"],
        "judge": judge_section(facts),
    }


def cards(heldout: dict, verdict: dict) -> list[dict]:
    """One card a score: base, tuned, their difference and both intervals on one scale."""
    made = []
    for key, entry in heldout.items():
        about, show = SCORES[key], shower(key)
        share = about.is_share
        scores = [entry[who] for who in ("base", "tuned")]
        ends = [end for s in scores if s for end in (s["value"], *(s["ci95"] or [])) if end is not None]
        difference = entry["difference"]
        label = f"{about.label}: base and tuned with their 95 % confidence intervals"
        axis = (lambda x: f"{x * 100:.0f} %") if share else number
        made.append({
            "key": key,
            "name": about.label,
            "note": about.unit,
            "main": key == verdict["metric"],
            "base": scores[0] and show(scores[0]["value"]),
            "tuned": scores[1] and show(scores[1]["value"]),
            "difference": difference and change(difference["value"], share),
            "ci": bounds(difference, share),
            "tone": tone(difference, about.better == "higher"),
            "plot": plots.interval(*scores, 1.0 if share else plots.ceiling(max(ends, default=1.0)), axis, label),
        })  # fmt: skip
    return made


def shower(metric: str):
    """How a held-out score is written: as a percentage or as a number."""
    return percent if SCORES[metric].is_share else number


def tone(difference: dict | None, higher_is_better: bool) -> str:
    """The colour of a difference: "good", "bad", or "" where it may be chance."""
    words = {"better": "good", "worse": "bad", "can't tell": ""}
    return words[word(difference, higher_is_better)]


def change(value: float | None, share: bool, unit: bool = True) -> str:
    """A signed difference; of shares in percentage points."""
    if value is None:
        return "–"
    text = f"{value * 100:+z.1f}" if share else ("+" if value > 0 else "") + number(value)
    return text.replace("-", "−") + (" points" if share and unit else "")


def bounds(difference: dict | None, share: bool) -> list[str] | None:
    """Both ends of a difference's interval, in words; None without an interval."""
    ends = (difference or {}).get("ci95")
    return ends and [change(end, share, unit=False) for end in ends]


def score_rows(heldout: dict) -> list[dict]:
    """The held-out scores as rows of a table: what each means, both values, the difference, how sure, on how many."""
    rows = []
    for key, entry in heldout.items():
        about, difference = SCORES[key], entry["difference"]
        rows.append({"name": about.label, "note": about.meaning, "unit": about.unit} | row_of(
            entry, about.is_share, about.better == "higher", shower(key), difference
        ))  # fmt: skip
    return rows


def row_of(entry: dict, share: bool, higher_is_better: bool, show, difference: dict | None) -> dict:
    """What all tables of base against tuned have in common."""
    scores = {who: entry[who] for who in ("base", "tuned")}
    return {
        **{who: score and value_cell(score, show) for who, score in scores.items()},
        "n": next((score["n"] for score in scores.values() if score), None),
        "difference": difference and change(difference["value"], share),
        "ci": bounds(difference, share),
        "p": difference and probability(difference["p"]),
        "tone": tone(difference, higher_is_better) if difference else "",
        "word": word(difference, higher_is_better) if difference else "–",
    }


def value_cell(score: dict, show) -> dict:
    """A score and both ends of its interval, in words."""
    ci = score.get("ci95")
    return {"value": show(score["value"]), "ci": ci and [show(end) for end in ci]}


def probability(p: float | None) -> str:
    """A p-value; of a sampled test only so many digits are worth saying."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def fields_section(fields: dict) -> list[dict]:
    """One row a field: scores of base and tuned, and both F1 on one line."""
    rows = []
    for name, scores in fields.items():
        f1 = [scores[who]["f1"] for who in ("base", "tuned")]
        label = f"F1 of base {percent(f1[0])} and tuned {percent(f1[1])}"
        changes = {score: field_cell(scores["tuned"][score], found) for score, found in scores["difference"].items()}
        rows.append({"name": name, "n": scores["tuned"]["n"], "base_f1": percent(f1[0]), **changes,
                     "word": word(scores["difference"]["f1"], True), "plot": plots.pair(*f1, label)})  # fmt: skip
    return rows


def field_cell(tuned: float | None, found: dict | None) -> dict:
    """A score of one field: the tuned model's value, and the difference to its base where both have one."""
    return {
        "value": percent(tuned),
        "difference": found and change(found["value"], True, unit=False),
        "ci": bounds(found, True),
        "tone": tone(found, True),
    }


def tasks_section(tasks: list[dict], compared: list[dict]) -> list[dict]:
    """One row a task, with the guard's word and some documents at which the tuned model did worse."""
    shares = [is_share(row) for row in compared]
    span = max([0.05, *(end for row, share in zip(compared, shares, strict=True) if share for end in _ends(row))])
    rows = []
    for task, row, share in zip(tasks, compared, shares, strict=True):
        show = percent if share else number
        found, drop, higher = row["difference"], row["max_drop"], row["higher_is_better"]
        limit = None if drop is None else -drop if higher else drop
        ends = bounds(found, share)
        label = f"{row['task']}: {change(found['value'], share)}" + (
            f", 95 % CI {ends[0]} to {ends[1]}" if ends else ""
        )
        rows.append({
            "name": row["task"], "metric": row["metric"], "higher": higher, "few": row["num_fewshot"],
            "version": row["version"], "of": task["tuned"]["limit"],
            "guard": row["guard"], "drop": drop is not None and change(drop, share).lstrip("+"),
            "plot": plots.change(found, limit, span * 1.05, label) if share else "",
            **row_of(row, share, higher, show, found),
            "as_chat": task["tuned"]["chat_template"], "cut": task["tuned"]["prompts_cut"],
            "subtasks": subtasks(task, show),
            **documents(task["samples"], row["metric"], higher),
        })  # fmt: skip
    return rows


def subtasks(task: dict, show) -> list[tuple[str, int, str, str]]:
    """(name, documents, base, tuned) of each member of a group of tasks; none for a single task."""
    base, tuned = task["base"]["subtasks"] or {}, task["tuned"]["subtasks"] or {}
    return [(name, found["n"], show(base[name]["value"]), show(found["value"])) for name, found in tuned.items()]


def is_share(row: dict) -> bool:
    """Whether a task's score is a share of something: higher is better and both lie between 0 and 1."""
    return row["higher_is_better"] and all(0 <= row[who]["value"] <= 1 for who in ("base", "tuned"))


def _ends(row: dict) -> list[float]:
    found = row["difference"]
    return [abs(end) for end in (found["value"], *(found["ci95"] or []), row["max_drop"] or 0)]


def documents(samples: list[dict], metric: str, higher: bool) -> dict:
    """How many documents got better and worse, and the first few of the latter. One may have no reply, only a score."""
    gains = [(one["tuned"][metric] - one["base"][metric]) * (1 if higher else -1) for one in samples]
    lost = [one for one, gain in zip(samples, gains, strict=True) if gain < 0]
    return {
        "gained": sum(gain > 0 for gain in gains),
        "lost": len(lost),
        "examples": [
            {
                "id": one["id"],
                "prompt": clip(one["tuned"]["prompt"], LONGEST_TEXT),
                "reference": clip(one["tuned"]["reference"], LONGEST_TEXT),
                "replies": [
                    (who, clip(one[who]["reply"] or "", LONGEST_TEXT), number(one[who][metric]))
                    for who in ("base", "tuned")
                ],
            }
            for one in lost[:SHOWN_LOSSES]
        ],
    }


def judge_section(facts: dict) -> dict | None:
    """What the judge said: the bar of wins, ties and losses, key figures, and some of its judgements."""
    judge = facts["judge"]
    if judge is None:
        return None
    rate = judge["win_rate"]
    parts = [
        {"name": "tuned preferred", "count": judge["wins"], "kind": "tuned"},
        {"name": "tie", "count": judge["ties"], "kind": "tie"},
        {"name": "base preferred", "count": judge["losses"], "kind": "base"},
    ]
    ends = rate["ci95"] and " to ".join(map(percent, rate["ci95"]))
    return {
        **{name: judge[name] for name in ("model", "base_url", "criteria", "sentence", "verdict")},
        "parts": parts,
        "plot": plots.stacked(parts, f"{judge['wins']} wins, {judge['ties']} ties, {judge['losses']} losses"),
        "figures": [
            ("Win rate", percent(rate["value"]), f"95 % CI {ends}; ties count half" if ends else "ties count half"),
            ("Pairs", f"{judge['pairs']:,}", "each asked in both orders, blind"),
            ("Order decided", f"{judge['inconsistent']:,}", "pairs in which the orders disagree, counted as ties"),
            ("No answer", f"{judge['failed']:,}", "pairs left out"),
            ("p", probability(judge["p"]), "of a difference as large by chance"),
        ],
        "tone": {"better": "good", "worse": "bad"}.get(judge["verdict"], "unsure"),
        "judgements": judgements(facts["judgements"]),
    }  # fmt: skip


def judgements(rows: list[dict]) -> list[dict]:
    """A few judgements of each outcome, those that speak against the tuned model first."""
    by_outcome: dict[str, list[dict]] = {name: [] for name in OUTCOMES}
    for row in rows:
        by_outcome[outcome(row)].append(row)
    each = max(1, SHOWN_JUDGEMENTS // max(1, sum(map(bool, by_outcome.values()))))
    return [
        {
            "id": row["id"], "outcome": OUTCOMES[name][0], "tone": OUTCOMES[name][1],
            "gist": gist(turn_text(row["prompt"][-1])),
            "turns": [{"role": turn["role"], "content": clip(turn_text(turn), LONGEST_TEXT)} for turn in row["prompt"]],
            "reference": reference_text(row["reference"]),
            "replies": [
                (who, mark(row["reference"], row[who], row[who] == row["reference"])[0]) for who in ("base", "tuned")
            ],
            "said": list(zip((row["first"], row["second"]), row["reasons"], strict=True)),
        }
        for name, found in by_outcome.items()
        for row in found[:each]
    ]  # fmt: skip


def outcome(row: dict) -> str:
    """What the judge's two answers on a pair come to, as a key of OUTCOMES."""
    if row["first"] != row["second"]:
        return "inconsistent"
    return {"tuned": "win", "base": "loss", "tie": "tie"}[row["first"]]
