"""The verdict, and what a reader should know beside it, one line each: what speaks for it, against it, what it cost."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from adder.core.intervals import Verdict
from adder.evaluation import degenerate_replies
from adder.evaluation.metrics import SCORES
from adder.evaluation.records import JudgeRecord
from adder.formatting.records import OverlapFindings
from adder.merging.records import ProofRecord
from adder.report import first_look, plots, regression_guard
from adder.report.facts import RunFacts
from adder.report.formatting import clip, duration, energy, number, percent
from adder.report.page_section import PageSection, RunReport, View
from adder.report.run_metrics import Cost, Metrics
from adder.report.scores import Comparison
from adder.report.sections import evaluation_section
from adder.report.sections.evaluation_section import bounds, change, is_share, write_score
from adder.report.sections.merge_section import is_faithful
from adder.report.sections.provenance_section import money
from adder.training.monitoring.reply_symptoms import MOST, NAMED
from adder.training.monitoring.symptoms import Diagnosis

Tone = Literal["bad", "unsure", "good", "calm"]
SHOWN_WARNING = 90  # characters
MOST_LOOKED_FOR = 4  # kinds of rows that training and held-out rows may share; with fewer the word isn't green
WORST_FIRST = ("stop", "warning", "note")
MARKS: dict[Tone, str] = {"bad": "✗", "unsure": "!", "good": "✓", "calm": ""}
ORDER: dict[Tone, int] = {"bad": 0, "unsure": 1, "good": 2, "calm": 2}


class Line(NamedTuple):
    """A line beside the verdict: what it is about, how alarming it is, and the section that says more."""

    name: str
    tone: Tone
    text: str
    section: str

    @property
    def mark(self) -> str:
        """The sign before it, which goes with its tone."""
        return MARKS[self.tone]


def view(run: RunReport) -> View:
    """The sentence, the lines beside it, and a card a score."""
    metrics = run.metrics
    return {
        "tone": tone(metrics),
        "sentence": metrics["verdict"]["sentence"],
        "summary": summary(run.facts, metrics),
        "telling": first_look.telling(run.facts.samples, metrics["verdict"]["metric"]),
        "next": first_look.next_steps(run.settings.run, metrics, run.facts.diagnoses, _wrong(run.facts)),
        "cards": cards(metrics["heldout"], metrics["verdict"]["metric"]),
        "rows": len(run.facts.samples),
    }


def _wrong(facts: RunFacts) -> int:
    """How many tuned replies differ from references that a reply can match."""
    rights = [sample.tuned["exact_match"] for sample in facts.samples if "exact_match" in sample.tuned]
    return len(rights) - sum(rights) if sum(rights) else 0


def tone(metrics: Metrics) -> str:
    """The verdict's colour: "better", "worse", or "unsure", which one in doubt is too, or one that fails its guard."""
    found, guard = metrics["verdict"]["verdict"], metrics["guard"]
    if found == "better" and (metrics["verdict"]["doubts"] or (guard and not guard["passed"])):
        return "unsure"
    return found if found in ("better", "worse") else "unsure"


def summary(facts: RunFacts, metrics: Metrics) -> list[Line]:
    """What a reader should know beside the verdict, the alarming lines first."""
    lines = [
        scores_line(metrics["verdict"], metrics["heldout"]),
        doctor_line(facts.diagnoses, facts.preflight_warnings),
        data_line(facts.format["quality"]["overlap"], metrics["data"]["heldout"]),
        merge_line(facts.merge, facts.train.get("trainable_parameters") == facts.train.get("total_parameters")),
        reply_line(facts, metrics["heldout"]),
        guard_line(metrics),
        judge_line(metrics["judge"]),
        cost_line(metrics["cost"]),
    ]
    return sorted((line for line in lines if line), key=lambda line: ORDER[line.tone])


def scores_line(verdict: Verdict, heldout: Mapping[str, Comparison]) -> Line | None:
    """What the other scores say, where the main one leaves it open or is contradicted. The perplexity is the loss."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for name, entry in heldout.items():
        if name not in (verdict["metric"], "perplexity") and entry["verdict"] in found:
            found[entry["verdict"]].append(SCORES[name].label)
    against = found[{"better": "worse", "worse": "better"}.get(verdict["verdict"], "worse")]
    if not any(found.values()) or (verdict["verdict"] in found and not against):
        return None
    text = "; ".join(f"surely {how}: {', '.join(names)}" for how, names in found.items() if names)
    return Line("Other scores", "unsure" if against else "calm", text, "evaluation")


def doctor_line(diagnoses: list[Diagnosis], warnings: list[str]) -> Line:
    """The most serious finding of the training; `warnings` from before its first step."""
    if not diagnoses and warnings:
        return Line("Training", "unsure", f"warned before the first step: {clip(warnings[0], SHOWN_WARNING)}", "doctor")
    if not diagnoses:
        return Line("Training", "good", "nothing found of what the doctor looks for", "doctor")
    worst = min(diagnoses, key=lambda one: WORST_FIRST.index(one["severity"]))
    at = f" at step {worst['step']:,}" if worst["step"] is not None else ""
    more = f", and {len(diagnoses) - 1} more" if len(diagnoses) > 1 else ""
    tones: dict[str, Tone] = {"stop": "bad", "warning": "unsure", "note": "calm"}
    return Line("Training", tones[worst["severity"]], f"{worst['name']}{at}{more}", "doctor")


def data_line(overlap: OverlapFindings, heldout: int) -> Line:
    """Whether the held-out rows were kept out of training, by what was looked for: the verdict rests on it."""
    if stay := overlap["found"] - overlap["dropped"]:
        text = f"{stay:,} training rows ask much of what held-out or test rows ask"
        return Line("Held out", "unsure", text, "data")
    looked = overlap["looked_for"]
    kinds = ", ".join(looked[:-1]) + (f" or {looked[-1]}" if len(looked) > 1 else looked[-1])
    text = f"no training row left that has of any of the {heldout:,} held-out rows: {kinds}"
    return Line("Held out", "good" if len(looked) == MOST_LOOKED_FOR else "calm", text, "data")


def merge_line(proof: ProofRecord, full: bool) -> Line:
    """Whether the merged model was proven to be base + adapter; `full`: every weight was trained."""
    if full and "top_token_agreement" not in proof:
        return Line("Merged model", "calm", "every weight was trained: there was nothing to merge", "merge")
    if not proof.get("checked") or "top_token_agreement" not in proof:
        return Line("Merged model", "unsure", "not compared with what was trained", "merge")
    same = f"the same first choice at {percent(proof['top_token_agreement'], 2)} of positions"
    if not is_faithful(proof):
        return Line("Merged model", "unsure", f"predicts otherwise than the trained one: {same}", "merge")
    return Line("Merged model", "good", f"predicts as the trained one: {same}", "merge")


def reply_line(facts: RunFacts, heldout: Mapping[str, Comparison]) -> Line | None:
    """Replies that are none; else how near they come to free text, or that none is right; None without either."""
    faults = facts.faults
    if found := degenerate_replies.in_words(faults, NAMED):
        tone: Tone = "bad" if faults.share >= MOST else "unsure"
        return Line("Replies", tone, "; ".join(found), "replies")
    exact = heldout.get("exact_match")
    if not exact or not exact["tuned"] or exact["tuned"]["value"] != 0:
        return None
    near = [_nearness(name, heldout[name]) for name in ("rouge_l", "chrf") if name in heldout]
    if near:
        return Line("Replies", "calm", f"free text, none word for word its reference; {', '.join(near)}", "replies")
    text = f"none of the {exact['tuned']['n']:,} tuned replies is just as its reference"
    return Line("Replies", "unsure", text, "replies")


def _nearness(name: str, entry: Comparison) -> str:
    """A score of free text, of base and tuned."""
    both = [write_score(name, own["value"]) if own else "–" for own in (entry["base"], entry["tuned"])]
    return f"{SCORES[name].label} {both[0]} → {both[1]}"


def guard_line(metrics: Metrics) -> Line | None:
    """The tasks beside the held-out rows: what was lost, and what must not have been."""
    tasks, guarded = metrics["tasks"], metrics["guard"]
    if not tasks:
        return None
    if guarded and not guarded["passed"]:
        fell = [
            f"{row['task']} lost {f'{100 * drop:.1f} points' if is_share(row) else number(drop)}"
            for row in tasks
            if row["guard"] == "failed" and (drop := regression_guard.drop(row))
        ]
        return Line("Other tasks", "bad", f"the guard fails this run: {'; '.join(fell)}", "tasks")
    words = {
        "better": "better",
        "worse": "worse",
        "no difference": "no change that matters",
        "can't tell": "no sure change",
    }
    counts = [(word, sum(row["verdict"] == word for row in tasks)) for word in words]
    text = ", ".join(f"{count} {words[word]}" for word, count in counts if count)
    tone: Tone = "unsure" if dict(counts)["worse"] else "good" if guarded else "calm"
    return Line("Other tasks", tone, f"{text}{'; the guard passes' if guarded else ''}", "tasks")


def judge_line(judge: JudgeRecord | None) -> Line | None:
    """The judge's verdict in short."""
    if judge is None:
        return None
    tones: dict[str, Tone] = {"better": "good", "worse": "bad"}
    rate = percent(judge["win_rate"]["value"], 0)
    text = f"win rate of the tuned replies {rate} over {judge['pairs']:,} pairs"
    return Line("Judge", tones.get(judge["verdict"], "calm"), text, "judge")


def cost_line(cost: Cost) -> Line:
    """Time, price and energy, as far as known."""
    text = [duration(cost["total_seconds"])]
    if price := cost["price"]:
        text.append(money(price["value"], price["currency"]))
    if used := cost["energy"]:
        text.append(energy(used["joules"]))
    return Line("Cost", "calm", ", ".join(text), "provenance")


class ScoreCard(NamedTuple):
    """One score at a glance: both values, their difference, and both intervals on one scale."""

    name: str
    note: str
    main: bool
    base: str | None
    tuned: str | None
    difference: str | None
    ci: list[str] | None
    tone: str
    plot: str


def cards(heldout: Mapping[str, Comparison], main: str) -> list[ScoreCard]:
    """One card a score; `main` is the one that the verdict is about. Exact matches of free text, of which neither model
    has any, make room for the scores that fit.
    """
    fits = any(SCORES[name].is_share for name in heldout if name != "exact_match")
    left_out = {"exact_match"} if fits and _nothing(heldout.get("exact_match")) else set()
    return [_card(name, entry, name == main) for name, entry in heldout.items() if name not in left_out]


def _nothing(entry: Comparison | None) -> bool:
    """Whether both models have a score of 0."""
    both = [entry["base"], entry["tuned"]] if entry else []
    return bool(both) and all(score is not None and score["value"] == 0 for score in both)


def _card(name: str, entry: Comparison, main: bool) -> ScoreCard:
    score, difference = SCORES[name], entry["difference"]
    base, tuned, nothing = entry["base"], entry["tuned"], score.is_share and _nothing(entry)
    ends = [end for s in (base, tuned) if s for end in (s["value"], *(s["ci95"] or [])) if end is not None]
    axis: Callable[[float], str] = _whole_percent if score.is_share else number
    high = 1.0 if score.is_share else plots.ceiling(max(ends, default=1.0))
    label = f"{score.label}: base and tuned with their 95 % confidence intervals"
    return ScoreCard(
        name=score.label,
        note=score.unit,
        main=main,
        base=base and write_score(name, base["value"]),
        tuned=tuned and write_score(name, tuned["value"]),
        difference=change(difference["value"], score.is_share) if difference and not nothing else None,
        ci=None if nothing else bounds(difference, score.is_share),
        tone=evaluation_section.TONES.get(entry["verdict"], ""),
        plot=plots.interval(base, tuned, high, axis, label),
    )


def _whole_percent(share: float) -> str:
    return f"{share * 100:.0f} %"


SECTION = PageSection(name="verdict", anchor="verdict", title="Verdict", view=view)
