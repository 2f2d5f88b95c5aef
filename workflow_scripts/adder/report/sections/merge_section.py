"""The report's view of the merge: which weights it went into and why, and the proof that the result is what it was."""

from collections.abc import Callable
from typing import Any

from adder.merging.records import BaseRecord, HeldoutLosses, ProofRecord, ReloadedReply
from adder.report.formatting import clip, number, percent, size
from adder.report.page_section import Figure, PageSection, RunReport, View

FAITHFUL = 0.97  # of positions at which both have the same first choice; bf16 alone costs a percent at most
LONGEST_TEXT = 1500  # characters of the reloaded model's prompt and reply that are shown
# The names of proof.json's alternatives by the value of the choice.
CHOSEN = {"original": "merged into the original", "dequantized": "merged into the dequantised"}


def view(run: RunReport) -> View:
    """Base, logits, weights, reload and files, as far as the proof has them."""
    proof = run.facts.merge
    return {
        "reason": proof.get("reason", ""),
        "checked": proof.get("checked", False),
        "faithful": is_faithful(proof),
        "base": base_choice(proof.get("base")),
        "figures": figures(proof),
        "tolerance": proof.get("tolerance_reason"),
        "reloaded": reloaded(proof.get("reloaded")),
        "files": [
            (one["name"], size(one["bytes"]), f"{one['changed']:,}") for one in proof.get("files") or []
        ],
    }  # fmt: skip


def is_faithful(proof: ProofRecord) -> bool:
    """Whether merged and trained model were compared and agree, however far apart the settings let them be."""
    return proof.get("checked", False) and proof.get("top_token_agreement", 1.0) >= FAITHFUL


def base_choice(choice: BaseRecord | None) -> View | None:
    """The three held-out losses, the taken one marked; differences are to the adapter as it was trained."""
    if not choice:
        return None
    rows = [
        {
            "name": one["base"],
            "chosen": one["base"] == CHOSEN[choice["value"]],
            "loss": f"{one['loss']:.4f}",
            "difference": one["difference"] and signed(one["difference"]["value"]),
            "ci": [signed(end) for end in (one["difference"] or {}).get("ci95") or []],
        }
        for one in choice["alternatives"]
    ]
    measured = [(one["rows"], one["tokens"]) for one in choice["alternatives"]]
    return {"reason": choice["reason"], "rows": rows, "measured": measured[0] if measured else None}


def figures(proof: ProofRecord) -> list[Figure]:
    """What was compared and counted, as (name, value, what it means)."""
    allowed = f"; allowed are {number(tolerance)}" if (tolerance := proof.get("tolerance")) is not None else ""
    base = f"; the base is {number(base_kl)} away" if (base_kl := proof.get("base_kl")) is not None else ""
    rows = f" of {compared:,} held-out rows" if (compared := proof.get("rows")) else ""
    dequantised = (proof.get("base") or {}).get("value") == "dequantized"
    counted = "adapted or dequantised" if dequantised else "adapted"
    known: list[tuple[str, str, Callable[[Any], str], str]] = [
        ("kl", "KL divergence", number, f"nats per token between both{allowed}{base}"),
        ("top_token_agreement", "Same first choice", lambda v: percent(v, 2), "of both at a position"),
        ("max_difference", "Largest difference", number, "of any logit"),
        ("mean_difference", "Mean difference", number, "of all logits"),
        ("positions", "Compared", lambda v: f"{v:,}", f"positions{rows}"),
        ("changed_weights", "Weights changed", lambda v: f"{v:,}", f"of {proof.get('adapted_weights', 0):,} {counted}"),
        ("unchanged_weights", "Weights unchanged", lambda v: f"{v:,}", "though adapted: rounded away"),
    ]  # fmt: skip
    found = heldout_loss(proof.get("heldout_loss"))
    found += [(label, show(proof[name]), note) for name, label, show, note in known if proof.get(name) is not None]
    return [row for row in found if row[0] != "Weights unchanged" or row[1] != "0"]


def heldout_loss(found: HeldoutLosses | None) -> list[Figure]:
    """The figure of the merged model's loss beside that of base + adapter; none where it wasn't measured."""
    if not found:
        return []
    return [("Held-out loss", f"{found['merged']:.4f}", f"nats per token; base + adapter {found['adapter']:.4f}")]


def signed(value: float) -> str:
    """A difference of losses, with its sign unless it is nothing."""
    return f"{value:+.4f}".replace("-", "−") if round(value, 4) else "0.0000"


def reloaded(found: ReloadedReply | None) -> View | None:
    """The reply of the model read back from disk in a fresh process. One that differs does so at a tie: no fault."""
    if not found:
        return None
    return {
        "prompt": clip(found["prompt"], LONGEST_TEXT),
        "reply": clip(found["reply"], LONGEST_TEXT),
        "tied": found["tied"] and found["tied"]["position"],
    }


SECTION = PageSection(name="merge", anchor="merge", title="Merge", view=view)
