"""What goes wrong in a training run: the evidence, the likely cause, the setting to change; while it happens."""

import math

import numpy as np
from transformers import TrainerCallback

from adder.core.progress import Progress
from adder.training.monitoring import advice, symptoms
from adder.training.monitoring.symptoms import WIDER, Curves, diagnosis, finite, gentler, level

# AdamW's averages are over 10 steps, and warm-up takes some: the embedded default, quick as it is, needs 100.
FEW_STEPS = 20
# One illness, one diagnosis: the first name's signs are also some of the others'.
EXPLAINS = {
    "gradient explodes": ("loss diverges", "overfitting", "loss spikes", "loss flat"),
    "loss diverges": ("overfitting", "loss spikes", "gradient vanishes", "loss flat"),
    "gradient vanishes": ("loss flat",),
    "worse than guessing": ("loss flat",),
    "rows repeat": ("overfitting",),
    "replies never end": ("wrong replies",),
    "empty replies": ("wrong replies",),
}


def diagnose(rows: list[dict], facts: dict, settings: dict) -> list[dict]:
    """Return what is wrong, the most serious first; nothing for a healthy run.

    `rows`: metrics so far, {step, epoch, loss, grad_norm, learning_rate} a step and {step, epoch, eval_loss[,
    exact_match]} an evaluation. `settings`: those of section `train`. `facts`: ln_vocabulary (nats),
    trainable_parameters, labelled_share (of the tokens), dtype ("float32", "bfloat16", "float16"), examples, epochs,
    steps (planned), effective_batch (examples), final (whether training has ended), skipped_steps (by the fp16 scaler),
    samples ({exact_match, unfinished_share, empty_share} of the replies sampled last, and if known their `count` and
    `reply_tokens`) or None, base_loss (nats) or None. Facts that are missing are not judged by.

    A diagnosis: {name, severity: "stop" | "warning" | "note", step (where it shows) or None, evidence, cause, change}.
    """
    facts = {"final": False, "skipped_steps": 0, **{name: value for name, value in facts.items() if value is not None}}
    curves = Curves.of(rows)
    for certain in (_nothing_trainable, _not_a_number, _masked):
        if found := certain(rows, curves, facts, settings):
            return [found]
    checks = CHECKS if settings.get("loss") == "dft" else BY_HEIGHT + CHECKS
    found = [one for check in checks if (one := check(curves, facts, settings))]
    hidden = _explained(found)
    found = [one for one in found if one["name"] not in hidden]
    return sorted(found, key=lambda one: ("stop", "warning", "note").index(one["severity"]))


def explain_nan(rows: list[dict], settings: dict, dtype: str) -> str:
    """Why the loss has stopped being a number, and what to change: for the message that ends the run.

    `rows`: the metrics before that step (with or without it). `dtype`: that of the products.
    """
    return "; ".join(_nan_reasons(rows, settings, dtype))


def _nan_reasons(rows: list[dict], settings: dict, dtype: str) -> tuple[str, str, str]:
    """Evidence, cause and change."""
    curves, rate = Curves.of(rows), settings["learning_rate"]
    norms = curves.norms[np.isfinite(curves.norms)]
    if not len(curves.losses):
        evidence = "no step before had a loss that was a number"
        if dtype == "float16":
            return evidence, "numbers above 65,504 overflow in float16", WIDER
        cause = "the base model's weights hold infinities or its activations overflow; nothing of the training did this"
        return evidence, cause, "model.source: a copy whose files are whole, or train.compute_dtype: float32"
    evidence = f"the loss was {curves.losses[-1]:.3g} at step {curves.last_step}"
    usual = level(norms[-20:-1]) if len(norms) > 3 else math.nan
    risen = len(norms) > 3 and norms[-1] > 10 * usual
    if risen:
        evidence += f" and the gradient norm {norms[-1]:.3g}, after {usual:.3g} in the steps before"
    climbed = curves.losses[-1] > curves.losses[0] + 0.1 or level(curves.losses[-3:]) > curves.start + curves.doubt
    if risen or climbed:
        if climbed:
            evidence += f", after {curves.losses[0]:.3g} at the first"
        return evidence, "the steps are too large for this model", gentler(settings)
    if dtype == "float16":
        return evidence, "numbers above 65,504 overflow in float16", WIDER
    cause = "a single batch did it, without a sign before: a broken row, or a step that was too large"
    return evidence, cause, f"train.max_grad_norm: 0.3 and train.learning_rate: {rate / 3:.1e}"


def _nothing_trainable(rows, curves, facts, settings) -> dict | None:
    if facts.get("trainable_parameters") != 0:
        return None
    evidence = "0 parameters are trainable"
    cause = f"train.target_modules: {settings.get('target_modules')} matches no layer, or all are frozen"
    return diagnosis("nothing trainable", "stop", None, evidence, cause, "train.target_modules: all-linear")


def _not_a_number(rows, curves, facts, settings) -> dict | None:
    bad = [row for row in rows if row.get("loss") is not None and not finite(row["loss"])]
    if not bad:
        return None
    before = [row for row in rows if row["step"] < bad[0]["step"]]
    evidence, cause, change = _nan_reasons(before, settings, facts.get("dtype", "float32"))
    evidence = f"the loss is {bad[0]['loss']} at step {bad[0]['step']}; {evidence}"
    return diagnosis("loss not a number", "stop", bad[0]["step"], evidence, cause, change)


def _masked(rows, curves, facts, settings) -> dict | None:
    """A step without a label has loss 0 and gradient 0, exactly: nothing that is learnt ever reaches that."""
    share = facts.get("labelled_share")
    silent = (curves.losses == 0) & (curves.norms == 0)
    many = len(silent) >= 5 and silent.mean() >= 0.5
    if share != 0 and not many:
        return None
    parts = []
    if many:
        parts.append(f"loss and gradient are exactly 0 in {silent.sum()} of {len(silent)} steps")
    if share is not None:
        parts.append(f"{share:.2%} of the tokens carry loss")
    cause = "the labels are masked: no reply, or its cut-off end, lies within what carries loss"
    change = "tokenize.loss_on: assistant with a chat template that marks replies, and lengths.max_seq_length: auto"
    step = int(curves.steps[silent][0]) if many else None
    severity = "stop" if share == 0 or silent.all() else "warning"
    return diagnosis("labels masked", severity, step, ", ".join(parts), cause, change)


def _unending(curves: Curves, facts: dict, settings: dict) -> dict | None:
    share = facts.get("samples", {}).get("unfinished_share", 0)
    if share < 0.5 or not _good(curves, facts):
        return None
    evidence = f"{share:.0%} of the sampled replies do not end by themselves, at a loss of {_held_out(curves):.3g}"
    cause = "the end of a turn was not learnt: its token carries no loss, or is another than the one that stops replies"
    change = "tokenize.chat_template: chatml (whose replies end in the end-of-turn token, with loss)"
    return diagnosis("replies never end", "warning", curves.last_step, evidence, cause, change)


def _empty(curves: Curves, facts: dict, settings: dict) -> dict | None:
    share = facts.get("samples", {}).get("empty_share", 0)
    if share < 0.5 or not _good(curves, facts):
        return None
    evidence = f"{share:.0%} of the sampled replies are empty, at a loss of {_held_out(curves):.3g}"
    cause = "generation starts elsewhere than training does, or many training replies are empty"
    change = "tokenize.chat_template: chatml, and rows without a reply out of data.sources"
    return diagnosis("empty replies", "warning", curves.last_step, evidence, cause, change)


def _wrong_replies(curves: Curves, facts: dict, settings: dict) -> dict | None:
    """No exact match where the loss promises many: replies of T tokens at loss L match by exp(-L T) at least.

    That is the chance of sampling the reference; it is the mean of a convex function, so the mean loss understates it.
    """
    samples = facts.get("samples", {})
    if samples.get("exact_match") != 0 or not curves.evals:
        return None
    loss, tokens = curves.evals[-1]["eval_loss"], samples.get("reply_tokens") or 64
    chance = math.exp(-loss * tokens)
    if (1 - chance) ** (samples.get("count") or 3) > 0.05:
        return None
    evidence = f"no sampled reply is right, though a held-out loss of {loss:.2g} promises {chance:.0%} of them"
    cause = "replies are generated otherwise than they were learnt: another template, or one slip that leads astray"
    change = "tokenize.chat_template: the one that the model is asked with, and train.epochs: fewer"
    return diagnosis("wrong replies", "warning", curves.last_step, evidence, cause, change)


def _few_steps(curves: Curves, facts: dict, settings: dict) -> dict | None:
    steps, batch = facts.get("steps"), facts.get("effective_batch")
    if not steps or not batch or steps >= FEW_STEPS:
        return None
    seen = facts.get("examples", 0) * facts.get("epochs", 1)
    smaller = max(4, 2 ** int(math.log2(max(seen / advice.ENOUGH_STEPS, 1))))
    if 2 * smaller > batch:
        return None
    evidence = f"{steps} steps of {batch:g} examples are all the training there is"
    cause = "the effective batch is large for so few examples"
    change = f"train.effective_batch_size: {smaller}, which makes {seen / smaller:,.0f} steps"
    return diagnosis("few steps", "warning", None, evidence, cause, change)


def _many_steps(curves: Curves, facts: dict, settings: dict) -> dict | None:
    steps, batch = facts.get("steps"), facts.get("effective_batch")
    if not steps or not batch or batch >= 8 or steps * batch / 16 < 20 * advice.ENOUGH_STEPS:
        return None
    evidence = f"{steps:,} steps of only {batch:g} examples"
    cause = "the effective batch is small for so much data: noisy steps, and a machine that is never full"
    return diagnosis("small batch", "note", None, evidence, cause, "train.effective_batch_size: 16")


def _many_passes(curves: Curves, facts: dict, settings: dict) -> dict | None:
    examples, epochs = facts.get("examples"), facts.get("epochs", 0)
    if not examples or epochs <= 2 * advice.most_epochs(examples)[0]:
        return None
    most = advice.most_epochs(examples)[0]
    evidence = f"{epochs:g} passes over {examples:,} examples, where up to {most} are usual"
    change = f"train.epochs: {most}, or train.keep: best"
    return diagnosis("many passes", "note", None, evidence, "so many passes learn the rows by heart", change)


# These read the height of the training loss, which must be a cross-entropy in nats. That of `dft` is not: p log(1/p)
# is small where nothing is learnt yet, rises with learning and falls again.
BY_HEIGHT = (
    *(symptoms.diverging, symptoms.exploding, symptoms.vanishing, symptoms.worse_than_guessing, symptoms.flat),
    *(symptoms.near_zero, symptoms.memorised, symptoms.spikes),
)
CHECKS = (
    *(symptoms.overflow, symptoms.overfitting, _unending, _empty, _wrong_replies),
    *(_few_steps, _many_steps, _many_passes),
)
PASSED = "; it passed by the end"


class Doctor(TrainerCallback):
    """Diagnoses while training: says each new diagnosis once, and keeps all in `diagnoses`.

    `facts`: as `diagnose` takes them, but for `final`; the dictionary may be changed as training goes (samples,
    skipped_steps), it is read at each look. Looks come at every evaluation and about a hundred times a run. What was
    said before a kill is worked out again from the trainer's history, and not said again. `conclude` ends it.
    """

    def __init__(self, facts: dict, settings: dict, progress: Progress):
        self.facts, self.settings, self.progress = facts, settings, progress
        self._found: dict[str, dict] = {}

    @property
    def diagnoses(self) -> list[dict]:
        """What was found so far, in the order in which it showed."""
        return list(self._found.values())

    def on_train_begin(self, args, state, control, **kwargs):
        """Catch up with the history of a run that continues; look at the set-up."""
        self._found = {}
        for number, row in enumerate(state.log_history):
            if self._due(row, state):
                self._look(state.log_history[: number + 1], say=False)
        self._look(state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at the history, which holds this row already, when it is time."""
        if state.log_history and self._due(state.log_history[-1], state):
            self._look(state.log_history)

    def conclude(self, history: list[dict]) -> list[dict]:
        """Look once more at the whole of a finished run (`state.log_history`); return the diagnoses for its record.

        Those that no longer hold are kept as notes that say so.
        """
        current = self._look(history, final=True)
        names, hidden = {one["name"] for one in current}, _explained(current)
        self._found = {name: one for name, one in self._found.items() if name not in hidden}
        for name, one in self._found.items():
            if name not in names and not one["evidence"].endswith(PASSED):
                self._found[name] = {**one, "severity": "note", "evidence": one["evidence"] + PASSED}
        return self.diagnoses

    def _due(self, row: dict, state) -> bool:
        if "eval_loss" in row:
            return True
        return "loss" in row and row["step"] % max(5, state.max_steps // 100) == 0

    def _look(self, history: list[dict], say: bool = True, final: bool = False) -> list[dict]:
        found = diagnose(history, {**self.facts, "final": final}, self.settings)
        for one in found:
            if say and one["name"] not in self._found:
                self.progress.say(in_a_line(one))
            self._found[one["name"]] = one
        return found


def in_a_line(diagnosis: dict) -> str:
    """A diagnosis as one line for the terminal."""
    return "doctor: {name}: {evidence}; {cause}; change {change}".format(**diagnosis)


def _explained(found: list[dict]) -> set[str]:
    return {other for one in found for other in EXPLAINS.get(one["name"], ())}


def _good(curves: Curves, facts: dict) -> bool:
    """Whether replies should be good by now: half of the first epoch is over and the loss is low or has halved."""
    late = facts["final"] or (len(curves.epochs) and curves.epochs[-1] >= 0.5)
    return bool(late and len(curves.losses) and _held_out(curves) < max(0.5, 0.5 * curves.losses[0]))


def _held_out(curves: Curves) -> float:
    return curves.evals[-1]["eval_loss"] if curves.evals else curves.end
