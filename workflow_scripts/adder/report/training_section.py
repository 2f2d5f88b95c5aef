"""The report's view of the training: what the doctor found, curves, replies on the way, the look before the start."""

import re
from functools import partial

from adder.report import facts as report_data
from adder.report import formatting, plots
from adder.report.data_section import SPECIAL
from adder.report.formatting import GIST, duration, number, percent, sentence, size
from adder.report.samples_section import clip, mark, reference_text, turn_text
from adder.training import evaluation_history

SHOWN_STRIPS = 12
SHOWN_FRAMES = 12  # replies of one prompt; of more evaluations some are left out, evenly
SEVERITIES = ("stop", "warning", "note")
# What the doctor looks for, in words for someone who has never trained a model.
LOOKED_FOR = (
    "a loss that stays flat, climbs, jumps, or is near zero too early",
    "numbers that overflow",
    "gradients that explode or vanish",
    "labels that are masked",
    "a held-out loss that rises while the training loss falls",
    "replies that are empty, never end or stay wrong at a good loss",
    "steps and batch that don't suit the amount of data",
)
# A setting by its path, and its value where one stands behind it: a number, or a word that ends there.
SETTING = re.compile(
    r"(?<![\w.])(?:model|data|format|tokenize|lengths|train|merge|evaluate|runtime)\.[a-z][a-z_]*(?!\w|\.\w)"
    r"(?::? -?\d+(?:\.\d+)?(?:e[-+]?\d+)?\b"
    r"|: (?!fewer|more|less|lower|higher)[a-z][\w-]*(?=$|[,;).]| \(| and | or | with ))?"
)


def training_section(settings: dict, facts: dict) -> dict:
    """Curves, key figures, evaluations as a table, and which step's weights were kept."""
    train, kept = facts["train"], facts["train"].get("kept")
    return {
        "figures": figures(facts),
        "curves": [one for one in curves(settings, facts) if one["plot"]],
        "evaluations": evaluation_rows(facts),
        "kept": kept and {"step": kept["value"], "reason": with_settings(kept["reason"])},
        "resumed": train.get("resumed_from"),
    }


def figures(facts: dict) -> list[tuple[str, str, str]]:
    """Key figures as (name, value, note)."""
    train = facts["train"]
    batch = train.get("effective_batch") or {}
    share = train["trainable_parameters"] / train["total_parameters"] if train.get("total_parameters") else None
    tokens, planned = train.get("tokens_per_epoch"), train.get("planned_steps") or train["steps"]
    took = facts["records"]["train"]
    attempted = f" in {took['attempts']} attempts" if took.get("attempts") else ""
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


def epochs(train: dict) -> str:
    """The passes over the data, in words."""
    return f"{number(train['epochs'])} {'epoch' if train['epochs'] == 1 else 'epochs'}"


def curves(settings: dict, facts: dict) -> list[dict]:
    """Each plot as {title, unit, plot, legend}; `plot` is "" where there is nothing to draw."""
    marks = step_marks(settings, facts)
    losses = [{"name": "loss", "kind": "tuned", "points": points(facts, "loss")}]
    if evaluated := points(facts, "eval_loss"):
        losses.append({"name": "held-out loss", "kind": "heldout", "points": evaluated, "dots": True})
    exact = [{"name": "exact match", "kind": "heldout", "points": sampled_matches(facts), "dots": True}]
    asked = len({row["id"] for row in facts["sampled"]})
    unit = f"of {asked} sampled {'reply' if asked == 1 else 'replies'}" if asked else "of the sampled replies"
    loss = partial(plots.lines, losses, adapt=True, marks=marks)
    wanted = [("Loss", "nats per labelled token", losses, number, loss)]
    share = partial(plots.lines, exact, high=1.0, marks=[m for m in marks if m["kind"] != "found"])
    wanted.append(("Exact match", unit, exact, partial(percent, digits=0), share))
    for name, label, unit in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Throughput", "tokens per second"),
    ):
        series = [{"name": label.lower(), "kind": "plain", "points": points(facts, name)}]
        wanted.append((label, unit, series, number, partial(plots.lines, series, adapt=name == "grad_norm")))
    return [
        {
            "title": title,
            "unit": unit,
            "plot": draw(x_name="step", show=show, label=f"{title} by training step"),
            "legend": [(one["name"], one["kind"]) for one in series] if len(series) > 1 else [],
        }
        for title, unit, series, show, draw in wanted
    ]


def points(facts: dict, name: str) -> list[tuple[float, float]]:
    """(step, value) of each row of the metrics that has it."""
    return [(row["step"], row[name]) for row in facts["curve"] if row.get(name) is not None]


def sampled_matches(facts: dict) -> list[tuple[int, float]]:
    """(step, share of the sampled replies that were right), the base's at step 0 among them."""
    by_step: dict[int, list[float]] = {}
    for row in facts["sampled"]:
        by_step.setdefault(row["step"], []).append(row["exact_match"])
    found = dict(points(facts, "exact_match"))
    return sorted((found | {step: sum(right) / len(right) for step, right in by_step.items()}).items())


def best_step(settings: dict, facts: dict) -> int | None:
    """The step whose evaluation was best by `train.best_by`; None without evaluations."""
    by = next((row["value"] for row in settings["resolved"] if row["key"] == "train.best_by"), "loss")
    return evaluation_history.best_step(facts["curve"], by)


def step_marks(settings: dict, facts: dict) -> list[dict]:
    """The steps that a curve points out, as plots.lines takes them: best, kept, and where a diagnosis shows."""
    kept = (facts["train"].get("kept") or {}).get("value")
    named: dict[int, list[tuple[str, str]]] = {}
    wanted = [("best", "best", best_step(settings, facts)), ("kept", "kept", kept)]
    wanted += [("found", one["name"], one["step"]) for one in facts["train"].get("diagnoses") or []]
    for kind, name, step in wanted:
        if step is not None:
            named.setdefault(step, []).append((kind, name))
    marks = []
    for step, names in sorted(named.items()):
        found = [name for kind, name in names if kind == "found"]
        words = [name for kind, name in names if kind != "found"]
        words += found if len(found) < 3 else [f"{len(found)} findings"]
        marks.append({"x": step, "kind": names[0][0], "label": f"{', '.join(words)}: step {step:,}"})
    return marks


def evaluation_rows(facts: dict) -> list[dict]:
    """One row an evaluation: {step, loss (the median of the ten steps up to it), eval_loss, exact_match}."""
    losses, held, right = points(facts, "loss"), dict(points(facts, "eval_loss")), dict(sampled_matches(facts))
    rows = []
    for step in sorted(held.keys() | right.keys()):
        recent = [loss for at, loss in losses if at <= step][-10:]
        loss = sorted(recent)[len(recent) // 2] if recent else None
        rows.append({"step": step, "loss": loss, "eval_loss": held.get(step), "exact_match": right.get(step)})
    return rows


def doctor_section(settings: dict, facts: dict) -> dict:
    """What was found, the most serious first, with the settings as they are now; advice; the preflight's warnings.

    `found` is None where the training kept no record of the doctor.
    """
    diagnoses, preflight = facts["train"].get("diagnoses"), facts["train"].get("preflight") or {}
    # Lists (of sources) would be too long to be read here.
    rows = report_data.resolve(settings, facts)
    values = {row["key"]: row for row in rows if not isinstance(row["value"], list | dict)}
    found = None
    if diagnoses is not None:
        ordered = sorted(diagnoses, key=lambda one: SEVERITIES.index(one["severity"]))
        found = [
            {
                "name": one["name"],
                "severity": one["severity"],
                "step": one["step"],
                **{name: with_settings(sentence(one[name])) for name in ("evidence", "cause")},
                "change": with_settings(one["change"]),
                "now": [values[key] for key in mentioned(one["change"]) if key in values],
            }
            for one in ordered
        ]
    return {
        "found": found,
        "looked_for": LOOKED_FOR,
        "advice": [with_settings(line) for line in facts["train"].get("advice") or []],
        "warnings": [with_settings(sentence(line)) for line in preflight.get("warnings") or []],
    }


def with_settings(text: str) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it is a setting, to be set as code."""
    pieces, end = [], 0
    for match in SETTING.finditer(text):
        pieces += [(False, text[end : match.start()]), (True, match.group())]
        end = match.end()
    return [(code, piece) for code, piece in [*pieces, (False, text[end:])] if piece]


def mentioned(text: str) -> list[str]:
    """The paths of the settings that the text names, each once."""
    keys = [match.group().split(" ")[0].rstrip(":") for match in SETTING.finditer(text)]
    return list(dict.fromkeys(keys))


def preflight_section(facts: dict) -> dict | None:
    """What was seen before the first step: {figures, pieces: [{text, on, new (example)}], first, tokens}."""
    seen = facts["train"].get("preflight")
    if not seen:
        return None
    dead, took = len(seen["layers_without_gradient"]), facts["records"]["train"].get("seconds")
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
            {"text": piece["text"], "on": bool(piece["loss"]), "new": before != after}
            for piece, before, after in zip(pieces, examples[:1] + examples, examples, strict=False)
        ],
        "first": seen["batch"]["from"],
        "tokens": seen["batch"]["tokens"],
    }


def filmstrip(facts: dict) -> dict:
    """The replies to each sampled prompt, step by step: {strips, steps, shown (steps), prompts}.

    A strip is {id, gist, prompt, reference, frames: [{step, right, finished, kept, same, marked, unlike}]}.
    """
    kept = (facts["train"].get("kept") or {}).get("value")
    asked = {one["id"]: one["tuned"]["prompt"] for one in facts["samples"]}
    by_prompt: dict[str, list[dict]] = {}
    for row in facts["sampled"]:
        by_prompt.setdefault(row["id"], []).append(row)
    steps = sorted({row["step"] for row in facts["sampled"]})
    shown = set(_some(steps, SHOWN_FRAMES)) | ({kept} & set(steps))
    strips = []
    for name, rows in list(by_prompt.items())[:SHOWN_STRIPS]:
        first = rows[0]
        frames = [frame(row, kept) for row in sorted(rows, key=lambda row: row["step"]) if row["step"] in shown]
        for before, after in zip(frames, frames[1:], strict=False):
            after["same"] = after["reply"] == before["reply"]
        strips.append({
            "id": name,
            "gist": gist(first["prompt"], asked.get(name) or []),
            "prompt": clip(first["prompt"].strip()),
            "reference": reference_text(first["reference"]),
            "frames": frames,
        })  # fmt: skip
    return {"strips": strips, "steps": len(steps), "shown": len(shown), "prompts": len(by_prompt)}


def frame(row: dict, kept: int | None) -> dict:
    """One reply as a frame of the strip."""
    right = bool(row["exact_match"])
    marked, unlike = mark(row["reference"], row["reply"], right)
    return {
        "step": row["step"], "right": right, "finished": row.get("finished", True), "kept": row["step"] == kept,
        "reply": row["reply"], "same": False, "marked": marked, "unlike": unlike,
    }  # fmt: skip


def gist(prompt: str, turns: list[dict]) -> str:
    """What the prompt asks, in one line: its last turn where the evaluation knows it, else its end."""
    if turns:
        return formatting.gist(turn_text(turns[-1]))
    words = " ".join(SPECIAL.sub(" ", prompt).split())
    return words if len(words) <= GIST else f"… {words[-GIST:].partition(' ')[2]}"


def _some(values: list, most: int) -> list:
    """At most `most` of the values, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(n * (len(values) - 1) / (most - 1))] for n in range(most)]
