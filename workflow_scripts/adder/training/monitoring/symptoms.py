"""Signs of trouble in the curves of a training run: pure functions from the metrics to a diagnosis or None.

Losses of single steps are noisy, most of all with batches of one to four examples, so levels are medians, and a
difference counts only beyond twice its standard error or beyond a size that noise does not reach. A false alarm costs
more than a late word: what a healthy run can look like is passed over in silence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict, TypeGuard

import numpy as np
from numpy.typing import NDArray

from adder.evaluation.degenerate_replies import ReplyFaults, find_faults, turns
from adder.training.monitoring import advice
from adder.training.records import MetricsRow, SampleRow, TrainingFacts
from adder.training.stage import TrainSettings

Severity = Literal["stop", "warning", "note"]

ADAM_EPSILON = 1e-8  # torch's default: gradients below it no longer move a weight by the learning rate
# How far from what is usual a learning rate is a finding and not just a matter of advice: times, either way.
FAR_OFF = 5.0
# Models of fewer parameters than anybody has published rates for bear larger ones: so many times.
SMALL_MODEL, SMALL_BEARS = 10_000_000, 10.0
# Of the lowest usual learning rate: below this share nothing is learnt in any number of steps that people wait for.
FAR_TOO_LOW = 0.1
# LoRA's scale is usually between 0.25 (QLoRA: alpha 16, rank 64) and 8 (alpha 32, rank 4).
SCALE_FAR_TOO_LOW = 0.01
WIDER = "train.compute_dtype: bfloat16, or float32 where the card has no bf16"  # what float16's range asks for
VANISHED = 0.01  # share of the first gradients
NEAR_ZERO = 0.01  # nats a token: each is predicted with 99 % certainty
UNKNOWN_REPLY_TOKENS = 64.0


class Diagnosis(TypedDict):
    """What is wrong: the step where it shows (None: from the start), the evidence, the cause, the setting to change."""

    name: str
    severity: Severity
    step: int | None
    evidence: str
    cause: str
    change: str


@dataclass(frozen=True)
class Replies:
    """The replies of one step that were sampled while training; `reply_tokens`: mean length of their references."""

    count: int
    exact_match: float
    faults: ReplyFaults
    reply_tokens: float

    @classmethod
    def of(cls, rows: Sequence[SampleRow], reply_tokens: float | None) -> "Replies | None":
        """Figures of the rows of one step, None without any."""
        if not rows:
            return None
        return cls(
            count=len(rows),
            exact_match=sum(row["exact_match"] for row in rows) / len(rows),
            faults=find_faults(
                [row["reply"] for row in rows],
                [row["reference"] for row in rows],
                [row["finished"] for row in rows],
                [turns(row["prompt"]) for row in rows],
            ),
            reply_tokens=reply_tokens or UNKNOWN_REPLY_TOKENS,
        )


class Evaluation(NamedTuple):
    """An evaluation while training: the held-out loss in nats; `epoch` infinite and `exact_match` None if not known."""

    step: int
    epoch: float
    loss: float
    exact_match: float | None


@dataclass(frozen=True)
class Curves:
    """What a training shows at one look: the finite part of its metrics by step (float64), evaluations, replies.

    norms: NaN where none was logged, infinite where it was no number. skipped: steps that the fp16 scaler skipped.
    replies: those sampled last. final: whether training has ended.
    """

    steps: NDArray[np.float64]
    epochs: NDArray[np.float64]
    losses: NDArray[np.float64]
    norms: NDArray[np.float64]
    evals: list[Evaluation] = field(default_factory=list)
    skipped: int = 0
    replies: Replies | None = None
    final: bool = False

    @classmethod
    def of(cls, rows: Sequence[MetricsRow], replies: Replies | None = None, final: bool = False) -> "Curves":
        """Read metrics rows as the trainer logs them."""
        steps = [row for row in rows if finite(row.get("loss"))]
        norms, logged = _column(steps, "grad_norm"), np.array([row.get("grad_norm") is not None for row in steps], bool)
        norms[logged & ~np.isfinite(norms)] = math.inf
        evals = [
            Evaluation(row["step"], row.get("epoch", math.inf), loss, row.get("exact_match"))
            for row in rows
            if finite(loss := row.get("eval_loss"))
        ]
        return cls(
            steps=_column(steps, "step"),
            epochs=_column(steps, "epoch"),
            losses=_column(steps, "loss"),
            norms=norms,
            evals=evals,
            skipped=sum(row.get("skipped_step", 0) for row in rows),
            replies=replies,
            final=final,
        )

    @property
    def window(self) -> int:
        """How many steps a level is taken over: a quarter of the run, 5 to 20 (the median of 5 bears two odd ones)."""
        return max(5, min(20, len(self.losses) // 4))

    @property
    def start(self) -> float:
        """Level of the loss over the first steps."""
        return level(self.losses[: self.window])

    @property
    def end(self) -> float:
        """Level of the loss over the last steps."""
        return level(self.losses[-self.window :])

    @property
    def doubt(self) -> float:
        """Twice the standard error of the difference between two levels."""
        noise = max(_noise(self.losses), _noise(self.losses[-2 * self.window :]))
        # A median's standard error is 1.2533 times the mean's; the noise itself is known badly from few steps.
        return 2 * 1.2533 * noise * math.sqrt(2 / self.window) * (1 + 3 / math.sqrt(len(self.losses)))

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 without any."""
        return int(self.steps[-1]) if len(self.steps) else 0


def diverging(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """The loss stays above where it began, or has climbed back over half of what it had fallen."""
    count = len(curves.losses)
    if count < 8:
        return None
    first, now = curves.start, curves.end
    # One window's level strays by half of `doubt`; of many windows the lowest strays by more, so three times is asked.
    above = now - first > max(2 * curves.doubt, 0.1 * first, 0.1)
    levels = _levels(curves.losses, curves.window)
    best, lowest = int(levels.argmin()), float(levels.min())
    back = now - lowest > max(3 * curves.doubt, 0.5 * (first - lowest), 0.2)
    # The first level already holds steps of a fast climb; the first loss alone is the base's.
    began, recent = float(curves.losses[0]), _noise(curves.losses[-2 * curves.window :])
    fast = now - began > max(6 * recent, 1.5 * began, 0.5)
    if not (above or back or fast):
        return None
    was = f"it was {began:.3g} at the start" if above or fast else f"it was down to {lowest:.3g}"
    evidence = f"the loss is {now:.3g} over the last {curves.window} steps and {was}"
    step = curves.last_step if above or fast else int(curves.steps[best + curves.window - 1])
    cause = f"the steps are too large (train.learning_rate {settings.learning_rate:.1e})"
    return diagnosis("loss diverges", "warning", step, evidence, cause, gentler(settings))


def exploding(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """Gradients of ten times the first ones and of the clipping norm, while nothing is learnt from them."""
    norms = curves.norms[np.isfinite(curves.norms) & (curves.norms > 0)]
    if len(norms) < 8:
        return None
    width = min(curves.window, 10)
    # The first norms themselves: a level over many steps would hide a quick explosion in its own middle.
    first, now = level(norms[:3]), level(norms[-width:])
    if now < 10 * first or now < 10 * settings.max_grad_norm or curves.end < 0.9 * curves.losses[0]:
        return None
    evidence = f"the gradient norm is {now:.3g} over the last {width} steps and was {first:.3g} in the first, "
    evidence += f"the loss {curves.end:.3g} and {curves.losses[0]:.3g}"
    cause = f"the weights have left where they were good (train.learning_rate {settings.learning_rate:.1e})"
    return diagnosis("gradient explodes", "warning", curves.last_step, evidence, cause, gentler(settings))


def overflow(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """Gradients that are no numbers, beyond what finding the fp16 scale costs.

    The scaler starts at 65,536 and halves with each skipped step; then it doubles every 2,000 steps and skips one.
    """
    bad = np.isinf(curves.norms)
    skipped = max(curves.skipped, int(bad.sum()))
    half = facts.dtype == "float16"
    allowed = max(12, 0.05 * len(curves.losses)) if half else 0
    if skipped <= allowed:
        return None
    step = int(curves.steps[bad][0]) if bad.any() else curves.last_step
    evidence = f"the gradients overflowed in {skipped} of {len(curves.losses)} steps"
    if half:
        cause = "float16 ends at 65,504, and the scaler finds no scale that fits"
        return diagnosis("gradient overflow", "warning", step, f"{evidence}, which were skipped", cause, WIDER)
    cause = "activations or gradients leave the range of numbers"
    return diagnosis("gradient overflow", "warning", step, evidence, cause, gentler(settings))


def vanishing(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """Gradients below AdamW's epsilon, or far below the first ones, though the loss has not fallen by half."""
    norms = curves.norms[np.isfinite(curves.norms)]
    if len(norms) < 8 or curves.end < max(0.5 * curves.losses[0], 0.5):
        return None
    width = curves.window
    now, first = level(norms[-width:]), level(norms[:3])
    each = now / math.sqrt(max(facts.trainable_parameters, 1))
    if each >= ADAM_EPSILON and now >= VANISHED * first:
        return None
    evidence = f"the gradient norm is {now:.2g} ({each:.1g} a parameter) at a loss of {curves.end:.3g}"
    if each < ADAM_EPSILON:
        evidence += f", below AdamW's epsilon of {ADAM_EPSILON:.0e}"
    cause, change = "the trained weights hardly reach the output", "train.target_modules: all-linear"
    scale = _scale(settings)
    if scale < SCALE_FAR_TOO_LOW:
        cause, change = f"the adapter's scale is {scale:.1g}", f"train.lora_alpha: {2 * settings.lora_r}"
    elif now < VANISHED * first:
        cause = f"the norm was {first:.2g} at first: units have died or saturated after steps that were too large"
        change = gentler(settings)
    return diagnosis("gradient vanishes", "warning", curves.last_step, evidence, cause, change)


def worse_than_guessing(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """A loss above ln(vocabulary), which a model that knows nothing has, from the start and after ten steps.

    The base does not see its own language: tokens of another tokenizer, or a template full of tokens it never met.
    """
    guess = facts.ln_vocabulary
    if len(curves.losses) < 10:
        return None
    # 0.3 above: random weights are at ln(vocabulary) and a little over it.
    if min(*curves.losses[:3], curves.start, curves.end) < guess + 0.3:
        return None
    evidence = (
        f"the loss is {curves.end:.3g} after {curves.last_step} steps and was {curves.losses[0]:.3g} at the first, "
    )
    evidence += f"above the {guess:.3g} of blind guessing (ln of the vocabulary)"
    cause = "the tokens are not the base model's own: another tokenizer, or a template that it never saw"
    change = "tokenize.chat_template: null (the model's own), and model.source with the tokenizer that belongs to it"
    return diagnosis("worse than guessing", "warning", curves.last_step, evidence, cause, change)


def flat(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """No fall of the loss from the start on, and little enough noise to say so.

    Where a setting explains it, it is enough that no fall shows. Else a fall of 2 % must be ruled out, or the held-out
    loss, which is of the same examples each time, must stand still to 5 in 10,000 over half of the run; and not before
    a fifth of it.
    """
    count, planned = len(curves.losses), facts.steps or len(curves.losses)
    warmup = math.ceil(settings.warmup_ratio * planned)
    if curves.last_step < warmup + 10 or count < 10 or curves.end < 0.1:
        return None
    start, first = curves.start, float(np.mean(curves.losses[:3]))
    fall, least = start - curves.end, max(curves.doubt, 0.02 * start)
    after = [row for row in curves.evals if row.step > warmup]
    held = [row.loss for row in after]
    learns = fall > least or (len(held) > 1 and held[-1] < 0.98 * held[0])
    # A quick fall is over within the first level: the very first losses show it, which are noisier.
    learns = learns or first - curves.end > max(2 * curves.doubt, 0.02 * start)
    if learns or fall < -least:
        return None
    known, severity = _why_flat(settings), "warning"
    if known is not None:
        cause, change = known
    else:
        enough = curves.last_step >= max(warmup + 20, planned / 5) or (curves.final and count >= 20)
        still = abs(fall) + curves.doubt < 0.02 * start
        frozen = len(held) > 2 and max(held) - min(held) < 5e-4 * held[0]
        frozen = frozen and after[-1].step - after[0].step >= planned / 2 and abs(fall) < 0.02 * start
        if not enough or not (still or frozen):
            return None
        severity = "warning" if still else "note"  # evaluations can agree by chance
        cause = f"train.learning_rate {settings.learning_rate:.1e} is too low, or the base knows these rows already"
        change = f"train.learning_rate: {10 * settings.learning_rate:.1e}"
    evidence = f"the loss is {curves.end:.4g} after {curves.last_step} steps and was {start:.4g} at the start"
    if len(held) > 1:
        evidence += f", the held-out loss {held[-1]:.5g} after {held[0]:.5g}"
    return diagnosis("loss flat", severity, curves.last_step, evidence, cause, change)


def _why_flat(settings: TrainSettings) -> tuple[str, str] | None:
    """A cause that the settings give away, and what to change; None without one."""
    rate, scale = settings.learning_rate, _scale(settings)
    lowest = (advice.FULL_RATES if settings.method == "full" else advice.LORA_RATES)[-1][1]
    if rate < FAR_TOO_LOW * lowest:
        cause = f"train.learning_rate {rate:.1e} is far too low for method {settings.method}"
        return cause, f"train.learning_rate: {'1e-5' if settings.method == 'full' else '2e-4'}"
    if scale < SCALE_FAR_TOO_LOW:
        cause = f"the adapter's scale is {scale:.1g} (train.lora_alpha {settings.lora_alpha:g})"
        return cause, f"train.lora_alpha: {2 * settings.lora_r}"
    return None


def far_off(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """A learning rate far outside of what is usual: it can be told before the first step."""
    rate = settings.learning_rate
    if not facts.parameters:
        return None
    low, high, source = advice.usual_rate(settings.method, facts.parameters)
    if facts.parameters < SMALL_MODEL:
        high *= SMALL_BEARS
    if low / FAR_OFF <= rate <= high * FAR_OFF:
        return None
    times, way, end = (low / rate, "below the lowest", low) if rate < low else (rate / high, "above the highest", high)
    evidence = f"train.learning_rate is {rate:.1e}, {times:,.0f} times {way} that is usual here, {end:.0e}"
    cause = "a slip of the exponent, or a rate meant for another method: so far off " + (
        "a run ends before it has learnt anything" if rate < low else "training breaks what the base can do"
    )
    change = f"train.learning_rate: {math.sqrt(low * high):.1e} or thereabouts ({source})"
    return diagnosis("learning rate far off", "warning", None, evidence, cause, change)


def near_zero(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """Nothing left to learn before half of the examples were seen once, or before training.

    The held-out loss must agree where there is one: a narrow task is learnt quickly, but then new rows cost more.
    """
    early = curves.losses[curves.epochs <= 0.5]
    base = math.inf if facts.base_loss is None else facts.base_loss
    known = base < 0.05 or (len(curves.losses) >= 5 and level(curves.losses[:5]) < 0.05)
    levels = _levels(early, 10) if len(early) >= 10 else np.array([])
    quick = len(levels) and levels.min() < NEAR_ZERO
    if not (known or quick):
        return None
    if curves.evals and curves.evals[-1].loss >= 2 * NEAR_ZERO:
        return None
    if not known and not curves.evals and settings.eval_samples and not curves.final:
        return None  # the first evaluation will tell
    if known:
        step = 1
        evidence = (
            f"the loss is {min(base, level(curves.losses[:5]) if len(curves.losses) else base):.2g} before training"
        )
    else:
        at = int(np.argmax(levels < NEAR_ZERO))
        step = int(curves.steps[at + 9])
        evidence = f"the loss is {levels[at]:.2g} at step {step}, epoch {curves.epochs[at + 9]:.2f}"
    if curves.evals:
        evidence += f", and {curves.evals[-1].loss:.2g} on held-out rows"
    cause = "the answer stands in the prompt, rows repeat, or the task is too easy to need training"
    change = (
        "data.sources (or its convert): leave the answer out of the prompt, or train.max_examples: far fewer will do"
    )
    return diagnosis("loss near zero", "warning", step, evidence, cause, change)


def memorised(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """Near zero on training rows in the first epoch, and far from it on others: the rows were not new."""
    evals = [row for row in curves.evals if row.epoch <= 1]
    if not evals:
        return None
    seen = curves.losses[curves.steps <= evals[-1].step]
    if len(seen) < 10:
        return None
    train, held = level(seen[-10:]), evals[-1].loss
    if train > 0.1 or held < 10 * train or held - train < 0.5:
        return None
    evidence = f"in the first epoch the loss is {train:.2g} on training rows and {held:.3g} on held-out ones"
    cause = (
        "training rows repeat, so that the first epoch already meets them again, or held-out rows are of another kind"
    )
    change = "format.drop_duplicates: true and format.near_duplicates: drop"
    return diagnosis("rows repeat", "warning", evals[-1].step, evidence, cause, change)


def spikes(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """Steps far above the 20 before them, in loss and in gradient, that come again and again.

    Far: by 8 robust standard deviations, by 5 on a logarithmic scale, since the losses of small batches have a heavy
    tail, above the loss at the start, and with the gradient at twice its level. Fewer than 2 % of the steps do no harm.
    """
    width = 20
    if len(curves.losses) <= width:
        return None
    before = np.lib.stride_tricks.sliding_window_view(curves.losses, width)[:-1]
    norms = np.lib.stride_tricks.sliding_window_view(np.nan_to_num(curves.norms), width)[:-1]
    usual = np.median(before, axis=1)
    rise = curves.losses[width:] - usual
    high = (rise > 8 * _spread(before)) & (curves.losses[width:] > curves.start)
    logs = np.log(np.maximum(before, 1e-6))
    high &= np.log(np.maximum(curves.losses[width:], 1e-6)) - np.median(logs, axis=1) > 5 * _spread(logs)
    high &= np.nan_to_num(curves.norms[width:], posinf=math.inf) > 2 * np.median(norms, axis=1)
    if high.sum() < max(3, 0.02 * len(rise)):
        return None
    worst = int(np.argmax(np.where(high, rise, -math.inf)))
    step = int(curves.steps[width + worst])
    evidence = f"the loss jumped in {high.sum()} of {len(rise)} steps, at worst to {curves.losses[width + worst]:.3g} "
    evidence += f"from {usual[worst]:.3g} at step {step}"
    cause = "some batches are unlike the others (broken rows, another language), or the steps are almost too large"
    change = "data.sources: look at those rows; else train.max_grad_norm: 0.3 and train.learning_rate: "
    change += f"{settings.learning_rate / 2:.1e}"
    return diagnosis("loss spikes", "warning", step, evidence, cause, change)


def overfitting(curves: Curves, facts: TrainingFacts, settings: TrainSettings) -> Diagnosis | None:
    """The held-out loss has risen from its best while the training loss fell on.

    Evaluations see the same examples each time and so stray by a percent at most: 2 % in two evaluations count, or 10 %
    in one; and 0.02 nats at least, since near zero a percent is nothing.
    """
    if len(curves.evals) < 2:
        return None
    held = np.array([row.loss for row in curves.evals])
    best = int(held.argmin())
    rise, least = held[-1] - held[best], max(0.02 * held[best], 0.02)
    twice = len(held) - best > 2 and held[-2] - held[best] > least / 2
    if best == len(held) - 1 or rise <= least or not (twice or rise > max(0.1 * held[best], 0.05)):
        return None
    then = curves.losses[curves.steps <= curves.evals[best].step][-curves.window :]
    if not len(then) or curves.end >= level(then):
        return None
    at = curves.evals[best]
    epoch = at.epoch if math.isfinite(at.epoch) else 1.0
    evidence = f"the held-out loss was best at step {at.step} with {held[best]:.4g} and is {held[-1]:.4g} now, while "
    evidence += f"the training loss fell from {level(then):.3g} to {curves.end:.3g}"
    change = f"train.epochs: {max(round(epoch, 1), 0.1):g}, or train.keep: best with train.early_stopping: 2"
    severity, cause = "warning", "training rows are learnt by heart"
    if settings.keep == "best" and settings.best_by == "loss":
        severity, change = "note", f"nothing needs to: train.keep: best takes the adapter of step {at.step}"
    then_right, now_right = at.exact_match, curves.evals[-1].exact_match
    rises = then_right is not None and now_right is not None and now_right > then_right
    if severity == "warning" and rises:
        severity = "note"
        cause = f"the model grows too sure of itself, though exact matches still rose to {now_right:.0%}"
        change = "train.keep: best with train.best_by: exact_match"
    return diagnosis("overfitting", severity, at.step, evidence, cause, change)


def _column(rows: Sequence[MetricsRow], name: Literal["step", "epoch", "loss", "grad_norm"]) -> NDArray[np.float64]:
    """A column of the metrics, NaN where it isn't there."""
    return np.array([math.nan if (value := row.get(name)) is None else float(value) for row in rows], np.float64)


def diagnosis(name: str, severity: Severity, step: int | None, evidence: str, cause: str, change: str) -> Diagnosis:
    """A diagnosis as `doctor.diagnose` returns them."""
    return Diagnosis(name=name, severity=severity, step=step, evidence=evidence, cause=cause, change=change)


def gentler(settings: TrainSettings) -> str:
    """What to change where steps are too large."""
    return f"train.learning_rate: {settings.learning_rate / 10:.1e} (or train.max_grad_norm: 0.3)"


def _scale(settings: TrainSettings) -> float:
    """What LoRA's update is multiplied by; 1 for full training."""
    if settings.method == "full":
        return 1.0
    rank = settings.lora_r
    return settings.lora_alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def finite(value: float | None) -> TypeGuard[float]:
    """Whether a value was logged and is a number."""
    return value is not None and math.isfinite(float(value))


def level(values: NDArray[np.float64]) -> float:
    """The median, NaN of nothing."""
    return float(np.median(values)) if len(values) else math.nan


def _levels(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Moving median."""
    return np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)


def _spread(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Robust standard deviation of each row."""
    return 1.4826 * np.median(np.abs(rows - np.median(rows, axis=1, keepdims=True)), axis=1)


def _noise(values: NDArray[np.float64]) -> float:
    """Standard deviation of single values around their course: from the differences of neighbours, outliers apart."""
    if len(values) < 3:
        return math.inf
    return float(1.4826 * np.median(np.abs(np.diff(values))) / math.sqrt(2))
