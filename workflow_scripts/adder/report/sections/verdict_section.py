"""The verdict, and what a reader should know beside it, one line each: what speaks for it, against it, what it cost."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from adder.core.intervals import Verdict, word
from adder.evaluation.metrics import SCORES
from adder.evaluation.records import JudgeRecord
from adder.formatting.records import OverlapFindings
from adder.merging.records import ProofRecord
from adder.report import plots, regression_guard
from adder.report.facts import RunFacts
from adder.report.formatting import duration, number, percent
from adder.report.page_section import PageSection, RunReport, View
from adder.report.run_metrics import Cost, Metrics
from adder.report.scores import Comparison
from adder.report.sections import evaluation_section
from adder.report.sections.evaluation_section import bounds, change, is_share, write_score
from adder.report.sections.provenance_section import money
from adder.training.monitoring.symptoms import Diagnosis

Tone = Literal["bad", "unsure", "good", "calm"]
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
        "cards": cards(metrics["heldout"], metrics["verdict"]["metric"]),
        "rows": len(run.facts.samples),
    }


def tone(metrics: Metrics) -> str:
    """The verdict's colour: "better", "worse", or "unsure", which a better model is that fails its guard."""
    found, guard = metrics["verdict"]["verdict"], metrics["guard"]
    if found == "better" and guard and not guard["passed"]:
        return "unsure"
    return found if found in ("better", "worse") else "unsure"


def summary(facts: RunFacts, metrics: Metrics) -> list[Line]:
    """What a reader should know beside the verdict, the alarming lines first."""
    lines = [
        scores_line(metrics["verdict"], metrics["heldout"]),
        doctor_line(facts.diagnoses),
        data_line(facts.format["quality"]["overlap"], metrics["data"]["heldout"]),
        merge_line(facts.merge),
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
        change_word = word(entry["difference"], SCORES[name].better == "higher")
        if name not in (verdict["metric"], "perplexity") and change_word in found:
            found[change_word].append(SCORES[name].label)
    against = found[{"better": "worse", "worse": "better"}.get(verdict["verdict"], "worse")]
    if not any(found.values()) or (verdict["verdict"] in found and not against):
        return None
    text = "; ".join(f"surely {how}: {', '.join(names)}" for how, names in found.items() if names)
    return Line("Other scores", "unsure" if against else "calm", text, "evaluation")


def doctor_line(diagnoses: list[Diagnosis]) -> Line:
    """The most serious finding of the training."""
    if not diagnoses:
        return Line("Training", "good", "nothing found wrong", "doctor")
    worst = min(diagnoses, key=lambda one: WORST_FIRST.index(one["severity"]))
    at = f" at step {worst['step']:,}" if worst["step"] is not None else ""
    more = f", and {len(diagnoses) - 1} more" if len(diagnoses) > 1 else ""
    tones: dict[str, Tone] = {"stop": "bad", "warning": "unsure", "note": "calm"}
    return Line("Training", tones[worst["severity"]], f"{worst['name']}{at}{more}", "doctor")


def data_line(overlap: OverlapFindings, heldout: int) -> Line:
    """Whether the held-out rows were kept out of training: the verdict rests on it."""
    if stay := overlap["found"] - overlap["dropped"]:
        text = f"{stay:,} training rows ask much of what held-out or test rows ask"
        return Line("Held out", "unsure", text, "data")
    unseen = f"no prompt of the {heldout:,} held-out rows is trained on"
    if overlap["action"] == "off":
        return Line("Held out", "calm", f"{unseen}; ones much like them were not looked for", "data")
    return Line("Held out", "good", f"{unseen}, nor one much like it", "data")


def merge_line(proof: ProofRecord) -> Line:
    """Whether the merged model was proven to be base + adapter."""
    if not proof.get("checked"):
        return Line("Merged model", "unsure", "not compared with what was trained", "merge")
    if "top_token_agreement" not in proof:
        return Line("Merged model", "good", "every weight was trained: there was nothing to merge", "merge")
    same = f"the same first choice at {percent(proof['top_token_agreement'], 2)} of positions"
    return Line("Merged model", "good", f"predicts as the trained one: {same}", "merge")


def reply_line(facts: RunFacts, heldout: Mapping[str, Comparison]) -> Line | None:
    """Replies none of which is right, or many of which never ended; None where there is no such thing to say."""
    exact = heldout.get("exact_match")
    if exact and exact["tuned"] and exact["tuned"]["value"] == 0:
        text = f"none of the {exact['tuned']['n']:,} tuned replies is just as its reference"
        return Line("Replies", "unsure", text, "replies")
    asked = sum(one.tuned["reply"] is not None for one in facts.samples)
    generation = facts.tuned.get("generation")
    cut = generation["truncated"] if generation else 0
    if not asked or cut < 0.05 * asked:
        return None
    text = f"{cut:,} of {asked:,} tuned replies were cut off: they did not end"
    return Line("Replies", "unsure", text, "evaluation")


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
    counts = [(word, sum(row["verdict"] == word for row in tasks)) for word in ("better", "worse", "can't tell")]
    words = {"better": "better", "worse": "worse", "can't tell": "no sure change"}
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
    if energy := cost["energy"]:
        text.append(f"{number(energy['joules'] / 3.6e6)} kWh")
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
    """One card a score; `main` is the one that the verdict is about."""
    return [_card(name, entry, name == main) for name, entry in heldout.items()]


def _card(name: str, entry: Comparison, main: bool) -> ScoreCard:
    score, difference = SCORES[name], entry["difference"]
    base, tuned = entry["base"], entry["tuned"]
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
        difference=difference and change(difference["value"], score.is_share),
        ci=bounds(difference, score.is_share),
        tone=evaluation_section.tone(difference, score.better == "higher"),
        plot=plots.interval(base, tuned, high, axis, label),
    )


def _whole_percent(share: float) -> str:
    return f"{share * 100:.0f} %"


SECTION = PageSection(name="verdict", anchor="verdict", title="Verdict", view=view)
