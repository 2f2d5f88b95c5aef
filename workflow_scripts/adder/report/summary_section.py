"""What a reader should know beside the verdict, one line each: what speaks for it, against it, and what it cost."""

from adder.core.intervals import word
from adder.evaluation.metrics import SCORES
from adder.report import regression_guard
from adder.report.evaluation_section import is_share
from adder.report.formatting import duration, number, percent
from adder.report.provenance_section import money

WORST_FIRST = ("stop", "warning", "note")
MARKS = {"bad": "✗", "unsure": "!", "good": "✓", "calm": ""}
ORDER = {"bad": 0, "unsure": 1, "good": 2, "calm": 2}


def summary(facts: dict, metrics: dict) -> list[dict]:
    """Lines {name, tone ("bad", "unsure", "good" or "calm"), mark, text, section}, the alarming ones first."""
    lines = [
        scores_line(metrics["verdict"], metrics["heldout"]),
        doctor_line(facts["train"].get("diagnoses")),
        data_line(facts["format"]["quality"]["overlap"], metrics["data"]),
        merge_line(facts["merge"]),
        reply_line(facts, metrics),
        guard_line(metrics),
        judge_line(metrics["judge"]),
        cost_line(metrics["cost"]),
    ]
    return sorted(filter(None, lines), key=lambda line: ORDER[line["tone"]])


def line(name: str, tone: str, text: str, section: str) -> dict:
    """One line; its mark goes with its tone."""
    return {"name": name, "tone": tone, "mark": MARKS[tone], "text": text, "section": section}


def scores_line(verdict: dict, heldout: dict) -> dict | None:
    """What the other scores say, where the main one leaves it open or is contradicted. The perplexity is the loss."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for name, entry in heldout.items():
        told = word(entry["difference"], SCORES[name].better == "higher")
        if name not in (verdict["metric"], "perplexity") and told in found:
            found[told].append(SCORES[name].label)
    against = found[{"better": "worse", "worse": "better"}.get(verdict["verdict"], "worse")]
    if not any(found.values()) or (verdict["verdict"] in found and not against):
        return None
    text = "; ".join(f"surely {told}: {', '.join(names)}" for told, names in found.items() if names)
    return line("Other scores", "unsure" if against else "calm", text, "evaluation")


def doctor_line(diagnoses: list[dict] | None) -> dict:
    """The most serious finding of the training."""
    if diagnoses is None:
        return line("Training", "unsure", "was not watched", "doctor")
    if not diagnoses:
        return line("Training", "good", "nothing found wrong", "doctor")
    worst = min(diagnoses, key=lambda one: WORST_FIRST.index(one["severity"]))
    at = f" at step {worst['step']:,}" if worst["step"] is not None else ""
    more = f", and {len(diagnoses) - 1} more" if len(diagnoses) > 1 else ""
    tones = {"stop": "bad", "warning": "unsure", "note": "calm"}
    return line("Training", tones[worst["severity"]], f"{worst['name']}{at}{more}", "doctor")


def data_line(overlap: dict, counts: dict) -> dict:
    """Whether the held-out rows were kept out of training: the verdict rests on it."""
    if stay := overlap["found"] - overlap["dropped"]:
        return line("Held out", "unsure", f"{stay:,} training rows ask much of what held-out or test rows ask", "data")
    unseen = f"no prompt of the {counts['heldout']:,} held-out rows is trained on"
    if overlap["action"] == "off":
        return line("Held out", "calm", f"{unseen}; ones much like them were not looked for", "data")
    return line("Held out", "good", f"{unseen}, nor one much like it", "data")


def merge_line(proof: dict) -> dict:
    """Whether the merged model was proven to be base + adapter."""
    if not proof.get("checked"):
        return line("Merged model", "unsure", "not compared with what was trained", "merge")
    if "top_token_agreement" not in proof:
        return line("Merged model", "good", "every weight was trained: there was nothing to merge", "merge")
    same = f"the same first choice at {percent(proof['top_token_agreement'], 2)} of positions"
    return line("Merged model", "good", f"predicts as the trained one: {same}", "merge")


def reply_line(facts: dict, metrics: dict) -> dict | None:
    """Replies none of which is right, or many of which never ended; None where there is no such thing to say."""
    exact = metrics["heldout"].get("exact_match")
    if exact and exact["tuned"] and exact["tuned"]["value"] == 0:
        text = f"none of the {exact['tuned']['n']:,} tuned replies is just as its reference"
        return line("Replies", "unsure", text, "replies")
    asked = sum(one["tuned"]["reply"] is not None for one in facts["samples"])
    cut = (facts["evaluate_tuned"].get("generation") or {}).get("truncated") or 0
    if not asked or cut < 0.05 * asked:
        return None
    return line("Replies", "unsure", f"{cut:,} of {asked:,} tuned replies were cut off: they did not end", "evaluation")


def guard_line(metrics: dict) -> dict | None:
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
        return line("Other tasks", "bad", f"the guard fails this run: {'; '.join(fell)}", "tasks")
    counts = [(word, sum(row["verdict"] == word for row in tasks)) for word in ("better", "worse", "can't tell")]
    words = {"better": "better", "worse": "worse", "can't tell": "no sure change"}
    text = ", ".join(f"{count} {words[word]}" for word, count in counts if count)
    tone = "unsure" if dict(counts)["worse"] else "good" if guarded else "calm"
    return line("Other tasks", tone, f"{text}{'; the guard passes' if guarded else ''}", "tasks")


def judge_line(judge: dict | None) -> dict | None:
    """The judge's verdict in short."""
    if judge is None:
        return None
    tone = {"better": "good", "worse": "bad"}.get(judge["verdict"], "calm")
    rate = percent(judge["win_rate"]["value"], 0)
    return line("Judge", tone, f"win rate of the tuned replies {rate} over {judge['pairs']:,} pairs", "judge")


def cost_line(cost: dict) -> dict:
    """Time, price and energy, as far as known."""
    text = [duration(cost["total_seconds"])]
    if price := cost["price"]:
        text.append(money(price["value"], price["currency"]))
    if energy := cost["energy"]:
        text.append(f"{number(energy['joules'] / 3.6e6)} kWh")
    return line("Cost", "calm", ", ".join(text), "provenance")
