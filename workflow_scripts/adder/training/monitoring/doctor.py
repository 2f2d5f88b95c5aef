"""What goes wrong in a training run: the evidence, the likely cause, the setting to change.

Pure functions: the live doctor (`doctor_callback`) calls them while training, for the terminal, and the report calls
them with what training wrote. Nothing here decides anything about a training.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from adder.training.monitoring import advice, symptoms
from adder.training.monitoring.reply_symptoms import MOST, reply_symptoms
from adder.training.monitoring.symptoms import WIDER, Curves, Diagnosis, Replies, diagnosis, finite, gentler, level
from adder.training.records import MetricsRow, SampleRow, TrainingFacts
from adder.training.stage import TrainSettings

Check = Callable[[Curves, TrainingFacts, TrainSettings], Diagnosis | None]

# AdamW's averages are over 10 steps, and warm-up takes some: the embedded default, quick as it is, needs 100.
FEW_STEPS = 20
# One illness, one diagnosis: the first name's signs are also some of the others'.
EXPLAINS = {
    "gradient explodes": ("loss diverges", "overfitting", "loss spikes", "loss flat", "learning rate far off"),
    "loss diverges": ("overfitting", "loss spikes", "gradient vanishes", "loss flat", "learning rate far off"),
    "gradient vanishes": ("loss flat", "learning rate far off"),
    "loss flat": ("learning rate far off",),
    "worse than guessing": ("loss flat",),
    "rows repeat": ("overfitting",),
    "replies never end": ("wrong replies",),
    "empty replies": ("wrong replies",),
    "replies repeat": ("wrong replies",),
    "replies all alike": ("wrong replies",),
    "replies echo the prompt": ("wrong replies",),
}


class Findings:
    """What was found in a training so far, look by look: each diagnosis once, in the order in which they showed.

    Looks come with every evaluation and about a hundred times a run (see `is_due`).
    """

    def __init__(self, facts: TrainingFacts, settings: TrainSettings):
        self.facts, self.settings = facts, settings
        self._found: dict[str, Diagnosis] = {}

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """All of them, as they were seen last."""
        return list(self._found.values())

    def look(self, rows: Sequence[MetricsRow], samples: Sequence[SampleRow]) -> list[Diagnosis]:
        """Look at the metrics so far and the replies sampled so far; return the diagnoses that are new."""
        found = examine(rows, self.facts, self.settings, replies=_last_replies(rows, samples, self.facts))
        new = [one for one in found if one["name"] not in self._found]
        self._found |= {one["name"]: one for one in found}
        return new

    def replay(self, rows: Sequence[MetricsRow], samples: Sequence[SampleRow]) -> None:
        """Look as often as a doctor that was there from the start has looked."""
        self.look([], [])
        for number, row in enumerate(rows, start=1):
            if is_due(row, self.facts.steps):
                self.look(rows[:number], samples)

    def conclude(self, rows: Sequence[MetricsRow], samples: Sequence[SampleRow]) -> list[Diagnosis]:
        """Look at the whole of a finished training; what no longer holds is kept as a note that says so."""
        replies = Replies.of(_of_last_step(row for row in samples if row["step"]), self.facts.reply_tokens)
        current = examine(rows, self.facts, self.settings, replies=replies, final=True)
        self._found |= {one["name"]: one for one in current}
        names, hidden = {one["name"] for one in current}, _explained(current)
        self._found = {name: one for name, one in self._found.items() if name not in hidden}
        for name, one in self._found.items():
            if name not in names and not one["evidence"].endswith(PASSED):
                self._found[name] = {**one, "severity": "note", "evidence": one["evidence"] + PASSED}
        return self.diagnoses


def diagnose(
    curve: Sequence[MetricsRow], samples: Sequence[SampleRow], facts: TrainingFacts, settings: TrainSettings
) -> list[Diagnosis]:
    """Return what was wrong in a finished training, in the order in which it showed; nothing for a healthy one.

    `curve`: the rows of metrics.jsonl. `samples`: those of samples.jsonl. What was seen on the way and passed by the
    end is a note.
    """
    findings = Findings(facts, settings)
    findings.replay(curve, samples)
    return findings.conclude(curve, samples)


def is_due(row: MetricsRow, steps: int) -> bool:
    """Whether to look when `row` is logged, in a training of so many planned steps."""
    return "eval_loss" in row or ("loss" in row and row["step"] % max(5, steps // 100) == 0)


def examine(
    rows: Sequence[MetricsRow],
    facts: TrainingFacts,
    settings: TrainSettings,
    replies: Replies | None = None,
    final: bool = False,
) -> list[Diagnosis]:
    """Return what is wrong at one look, the most serious first; nothing for a healthy run.

    `rows`: metrics so far. `replies`: those sampled last. `final`: whether training has ended.
    """
    curves = Curves.of(rows, replies, final)
    certain = (
        _nothing_trainable(facts, settings) or _not_a_number(rows, settings, facts.dtype) or _masked(curves, facts)
    )
    if certain:
        return [certain]
    checks = CHECKS if settings.loss == "dft" else BY_HEIGHT + CHECKS
    found = [one for check in checks if (one := check(curves, facts, settings))]
    found += _degenerate(curves, facts, settings)
    hidden = _explained(found)
    found = [one for one in found if one["name"] not in hidden]
    return sorted(found, key=lambda one: ("stop", "warning", "note").index(one["severity"]))


def explain_nan(rows: Sequence[MetricsRow], settings: TrainSettings, dtype: str) -> str:
    """Why the loss has stopped being a number, and what to change: for the message that ends the run.

    `rows`: the metrics before that step (with or without it). `dtype`: that of the matmuls.
    """
    return "; ".join(_nan_reasons(rows, settings, dtype))


def _nan_reasons(rows: Sequence[MetricsRow], settings: TrainSettings, dtype: str) -> tuple[str, str, str]:
    """Evidence, cause and change."""
    curves, rate = Curves.of(rows), settings.learning_rate
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


def _nothing_trainable(facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    if facts.trainable_parameters != 0:
        return None
    evidence = "0 parameters are trainable"
    cause = f"train.target_modules: {settings.target_modules} matches no layer, or all are frozen"
    return diagnosis("nothing trainable", "stop", None, evidence, cause, "train.target_modules: all-linear")


def _not_a_number(rows: Sequence[MetricsRow], settings: TrainSettings, dtype: str) -> Diagnosis | None:
    bad = [(row["step"], loss) for row in rows if (loss := row.get("loss")) is not None and not finite(loss)]
    if not bad:
        return None
    step, loss = bad[0]
    evidence, cause, change = _nan_reasons([row for row in rows if row["step"] < step], settings, dtype)
    return diagnosis("loss not a number", "stop", step, f"the loss is {loss} at step {step}; {evidence}", cause, change)


def _masked(curves: Curves, facts: TrainingFacts) -> Diagnosis | None:
    """A step without a label has loss 0 and gradient 0, exactly: nothing that is learnt ever reaches that."""
    share = facts.labelled_share
    silent = (curves.losses == 0) & (curves.norms == 0)
    many = len(silent) >= 5 and silent.mean() >= 0.5
    if share != 0 and not many:
        return None
    parts = [f"loss and gradient are exactly 0 in {silent.sum()} of {len(silent)} steps"] if many else []
    parts.append(f"{share:.2%} of the tokens carry loss")
    cause = "the labels are masked: no reply, or its cut-off end, lies within what carries loss"
    change = "tokenize.loss_on: assistant with a chat template that marks replies, and lengths.max_seq_length: auto"
    step = int(curves.steps[silent][0]) if many else None
    severity = "stop" if share == 0 or silent.all() else "warning"
    return diagnosis("labels masked", severity, step, ", ".join(parts), cause, change)


def _degenerate(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> list[Diagnosis]:
    """Replies that are none: of a finished training always, on the way once they should be good."""
    if curves.replies is None or not (curves.final or _good(curves)):
        return []
    return reply_symptoms(curves.replies.faults, curves.last_step, "sampled replies", MOST)


def _wrong_replies(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """No exact match where the loss promises many: replies of T tokens at loss L match by exp(-L T) at least.

    That is the chance of sampling the reference; it is the mean of a convex function, so the mean loss understates it.
    """
    replies = curves.replies
    if replies is None or replies.exact_match != 0 or not curves.evals:
        return None
    loss = curves.evals[-1].loss
    chance = math.exp(-loss * replies.reply_tokens)
    if (1 - chance) ** replies.count > 0.05:
        return None
    evidence = f"no sampled reply is right, though a held-out loss of {loss:.2g} promises {chance:.0%} of them"
    cause = "replies are generated otherwise than they were learnt: another template, or one slip that leads astray"
    change = "tokenize.chat_template: the one that the model is asked with, and train.epochs: fewer"
    return diagnosis("wrong replies", "warning", curves.last_step, evidence, cause, change)


def _few_steps(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    steps, batch = facts.steps, facts.effective_batch
    if not steps or not batch or steps >= FEW_STEPS:
        return None
    seen = facts.examples * facts.epochs
    smaller = max(4, 2 ** int(math.log2(max(seen / advice.ENOUGH_STEPS, 1))))
    if 2 * smaller > batch:
        return None
    evidence = f"{steps} steps of {batch:g} examples are all the training there is"
    cause = "the effective batch is large for so few examples"
    change = f"train.effective_batch_size: {smaller}, which makes {seen / smaller:,.0f} steps"
    return diagnosis("few steps", "warning", None, evidence, cause, change)


def _many_steps(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    steps, batch = facts.steps, facts.effective_batch
    if not steps or not batch or batch >= 8 or steps * batch / 16 < 20 * advice.ENOUGH_STEPS:
        return None
    evidence = f"{steps:,} steps of only {batch:g} examples"
    cause = "the effective batch is small for so much data: noisy steps, and a machine that is never full"
    return diagnosis("small batch", "note", None, evidence, cause, "train.effective_batch_size: 16")


def _many_passes(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    examples, epochs = facts.examples, facts.epochs
    if not examples or epochs <= 2 * advice.most_epochs(examples)[0]:
        return None
    most = advice.most_epochs(examples)[0]
    evidence = f"{epochs:g} passes over {examples:,} examples, where up to {most} are usual"
    change = f"train.epochs: {most}, or train.keep: best"
    return diagnosis("many passes", "note", None, evidence, "so many passes learn the rows by heart", change)


# These read the height of the training loss, which must be a cross-entropy in nats. That of `dft` is not: p log(1/p)
# is small where nothing is learnt yet, rises with learning and falls again.
BY_HEIGHT: tuple[Check, ...] = (
    *(symptoms.diverging, symptoms.exploding, symptoms.vanishing, symptoms.worse_than_guessing, symptoms.flat),
    *(symptoms.near_zero, symptoms.memorised, symptoms.spikes),
)
CHECKS: tuple[Check, ...] = (
    *(symptoms.far_off, symptoms.overflow, symptoms.overfitting, _wrong_replies),
    *(_few_steps, _many_steps, _many_passes),
)
PASSED = "; it passed by the end"


def in_a_line(diagnosis: Diagnosis) -> str:
    """A diagnosis as one line for the terminal."""
    return "doctor: {name}: {evidence}; {cause}; change {change}".format(**diagnosis)


def _explained(found: Iterable[Diagnosis]) -> set[str]:
    return {other for one in found for other in EXPLAINS.get(one["name"], ())}


def _good(curves: Curves) -> bool:
    """Whether replies should be good by now: half of the first epoch is over and the loss is low or has halved."""
    late = curves.final or (len(curves.epochs) and curves.epochs[-1] >= 0.5)
    return bool(late and len(curves.losses) and _held_out(curves) < max(0.5, 0.5 * curves.losses[0]))


def _held_out(curves: Curves) -> float:
    return curves.evals[-1].loss if curves.evals else curves.end


def _last_replies(rows: Sequence[MetricsRow], samples: Sequence[SampleRow], facts: TrainingFacts) -> Replies | None:
    """The replies that were known when the last of `rows` was logged: replies come after all that a step logs."""
    now = rows[-1]["step"] if rows else 0
    # Step 0 is the base, whose replies may be as they like.
    return Replies.of(_of_last_step(row for row in samples if 0 < row["step"] < now), facts.reply_tokens)


def _of_last_step(samples: Iterable[SampleRow]) -> list[SampleRow]:
    rows = list(samples)
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] == last]
