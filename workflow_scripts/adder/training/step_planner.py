"""How an optimizer step is computed: packs a forward pass, forward passes a step, and what is kept for backward.

On a GPU the fastest plan that fits is found by trial steps over the longest packs, in seconds. On a CPU, where timing
would take as long as training, the memory is counted and nothing is timed. A plan outlives a kill, so that a continued
run computes as it began, and where memory runs out all the same, the next smaller plan takes over.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from adder.core import hardware
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import atomic_write, read_json, write_json
from adder.core.rng import undisturbed
from adder.kernels.labelled_loss import has_plain_head, labelled_losses, supports_training
from adder.training.base_model import bare_model
from adder.training.batching import divisors, packs_in_words, packs_per_step
from adder.training.stage import TrainSettings

# What is kept for the backward pass, from the most memory and the least time to the opposite; transformers' options.
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "none": None,
    "every 4th layer": {"every_n_layers": 4},
    "every 2nd layer": {"every_n_layers": 2},
    "all layers": {},
    "all layers, offloaded": {"offload": True},  # what is kept of each layer waits in main memory
}
OFFLOADED = "all layers, offloaded"
# As the setting says it: true and false where that is meant.
SETTING = {"none": False, "all layers": True}
# On a CPU, matmuls with this many rows run at full speed; more only takes memory.
CPU_TOKENS = 1024
# Share of the memory that a plan must leave free: other batch shapes fragment it, and buffers that live longer come on
# top of a step. A CPU's main memory is shared with everything else on the machine.
HEADROOM = {"cuda": 0.08, "cpu": 0.3}
# A larger batch is looked for while it gains this much; less is within what two timings of one step differ by. Of two
# that are so close the larger is taken: 8B on an H100 and an H200 trained 2 to 3 % faster by 8 packs a pass than by 4.
GAIN = 1.02
# The next size that is tried is at least so many times the last: neighbouring divisors are equally fast.
STEP = 1.5
# Trials stop after so many seconds, if something that fits is found.
SECONDS = 20.0
# A first step that took longer than this, and was not much slower than the trials before it, is its own timing.
LONG_STEP = 2.0
# A step is repeated, up to so many times, while it comes out faster than the one before by more than that: kernels are
# compiled and tuned, memory is reserved.
MOST_STEPS, SETTLED = 4, 1.15
# AdamW's two moments of each trained parameter, in fp32; they come with the first step, after the trials.
OPTIMIZER_BYTES = 8
COUNTED_TOKENS = 64  # a CPU's memory is counted on so many
PLAN_FILE = "plan.json"

Packs = Sequence[Sequence[int]] | Sequence[NDArray[np.int32]]  # token counts of the examples in each pack


@dataclass(frozen=True)
class StepPlan:
    """`micro_batch` packs a forward pass, `accumulation` of these a step; `checkpointing`: one of CHECKPOINTING."""

    micro_batch: int
    accumulation: int
    checkpointing: str = "none"

    def __str__(self) -> str:
        how = {"none": "nothing recomputed", OFFLOADED: "all layers recomputed, what they keep in main memory"}
        return (
            f"{packs_in_words(self.micro_batch)} a forward pass, "
            f"{how.get(self.checkpointing, f'{self.checkpointing} recomputed')}"
        )


@dataclass(frozen=True)
class StepChoices:
    """How an optimizer step is computed, with reasons. Kept beside the checkpoints, for the starts that follow.

    `gradient_checkpointing` is as the setting says it, or one of CHECKPOINTING. `frozen_products`: the precision of the
    frozen base's matmuls, where that was measured. `memory_fallback`: what was done where memory ran out.
    """

    processes: Choice
    micro_batch_size: Choice
    gradient_accumulation_steps: Choice
    gradient_checkpointing: Choice
    frozen_products: Choice | None = None
    memory_fallback: Choice | None = None

    @property
    def plan(self) -> StepPlan:
        """The plan that the choices stand for."""
        named: dict[bool | str, str] = {setting: level for level, setting in SETTING.items()}
        level = self.gradient_checkpointing.value
        return StepPlan(
            self.micro_batch_size.value, self.gradient_accumulation_steps.value, named.get(level, str(level))
        )

    def named(self) -> dict[str, Choice]:
        """The choices that were made, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: choice for name, choice in found.items() if choice is not None}


class StepPacks(NamedTuple):
    """How many packs an optimizer step sees, however many processes share it, and the sentence that says so."""

    packs: int
    reason: str


@dataclass(frozen=True)
class Trial:
    """What a plan was seen, or where `tokens_per_second` is None expected, to need."""

    plan: StepPlan
    fits: bool
    peak_memory_bytes: int | None = None
    tokens_per_second: float | None = None
    room_bytes: int | None = None  # that it may take

    @property
    def speed(self) -> float:
        """Tokens a second, 0 where nothing was timed."""
        return self.tokens_per_second or 0.0

    @property
    def peak(self) -> int:
        """Bytes that it takes, 0 where that isn't known."""
        return self.peak_memory_bytes or 0

    @property
    def room(self) -> int:
        """Bytes that it may take, 0 where that isn't known."""
        return self.room_bytes or 0

    def row(self) -> dict[str, Any]:
        """The trial as one of a choice's alternatives."""
        return {
            "micro_batch": self.plan.micro_batch,
            "checkpointing": self.plan.checkpointing,
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second),
            "peak_memory_bytes": self.peak_memory_bytes,
            "fits": self.fits,
        }


class MemoryRanOut(Exception):
    """Training ran out of memory; the message says with what it can go on."""


# Choosing -------------------------------------------------------------------------------------------------------------


def step_packs(settings: TrainSettings, seq_lengths: Packs) -> StepPacks:
    """How many packs make an optimizer step: a multiple of micro_batch_size, where that is set."""
    packs, sentence = packs_per_step(settings.effective_batch_size, seq_lengths)
    if settings.micro_batch_size != "auto":
        size = min(settings.micro_batch_size, packs)
        packs = max(1, round(packs / size)) * size
    return StepPacks(packs, sentence)


def choose_step(
    settings: TrainSettings,
    seq_lengths: Packs,
    per_step: StepPacks,
    device: str,
    levels: Sequence[str],
    try_plan: Callable[[StepPlan], Trial],
    processes: Choice,
) -> StepChoices:
    """Choose the fastest way to compute a step that fits into memory, by trials.

    `levels`: those of CHECKPOINTING that the model supports. `try_plan` returns a Trial over the longest packs. The
    plan is that of each of `processes`. Raises UserError if nothing fits.
    """
    share, sentence = per_step
    if processes.value > 1:
        sentence += f", shared by {processes.value} processes"
        share = -(-share // processes.value)
    wanted, checkpointing = settings.micro_batch_size, settings.gradient_checkpointing
    sizes = divisors(share) if wanted == "auto" else [min(wanted, share)]
    if checkpointing != "auto":
        levels = ["all layers" if checkpointing else "none"]
    longest = max(map(sum, seq_lengths))
    if device == "cpu":
        sizes = [size for size in sizes if size == sizes[0] or size * longest <= CPU_TOKENS]
        trials = first_that_fits(sizes, levels, share, try_plan)
    else:
        trials = search(sizes, levels, share, seq_lengths, try_plan)
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        raise _nothing_fits(trials[-1].plan, longest, device, settings.method)
    best = _best(fitting)
    steps = best.plan.accumulation
    why = "as set" if wanted != "auto" else _size_reason(best, trials, device)
    in_passes = f", in {steps} forward passes{' each' if processes.value > 1 else ''}" if steps > 1 else ""
    return StepChoices(
        processes=processes,
        micro_batch_size=Choice(
            best.plan.micro_batch,
            f"{packs_in_words(best.plan.micro_batch)} a forward pass: {why}",
            [trial.row() for trial in trials],
        ),
        gradient_accumulation_steps=Choice(steps, sentence + in_passes),
        gradient_checkpointing=Choice(
            SETTING.get(best.plan.checkpointing, best.plan.checkpointing),
            "as set" if checkpointing != "auto" else _checkpointing_reason(best, trials, device),
        ),
    )


def _nothing_fits(least: StepPlan, longest: int, device: str, method: str) -> UserError:
    return UserError(
        f"not even {packs_in_words(least.micro_batch)} of {longest} tokens fits in this "
        f"{'GPU' if device == 'cuda' else 'machine'}'s memory"
        f"{'' if least.checkpointing == 'none' else ' with gradient checkpointing'}; lower lengths.max_seq_length "
        f"or train.lora_r{'' if method == 'qlora' else ', or use train.method: qlora'}"
    )


def choose_step_untried(
    settings: TrainSettings, per_step: StepPacks, levels: Sequence[str], processes: Choice
) -> StepChoices:
    """As choose_step, without trials: for a model in shards, whose ranks a failed trial would leave out of step."""
    share = -(-per_step.packs // processes.value)
    wanted, checkpointing = settings.micro_batch_size, settings.gradient_checkpointing
    micro = 1 if wanted == "auto" else min(wanted, share)
    recomputed = "all layers" in levels if checkpointing == "auto" else checkpointing
    why = "nothing is tried with a model in shards"
    return StepChoices(
        processes=processes,
        micro_batch_size=Choice(
            micro,
            f"{packs_in_words(micro)} a forward pass: {'as set' if wanted != 'auto' else f'the least, since {why}'}",
        ),
        gradient_accumulation_steps=Choice(
            -(-share // micro), f"{per_step.reason}, shared by {processes.value} processes"
        ),
        gradient_checkpointing=Choice(
            recomputed, "as set" if checkpointing != "auto" else f"needs the least memory, and {why}"
        ),
    )


def first_that_fits(
    sizes: list[int], levels: Sequence[str], per_step: int, try_plan: Callable[[StepPlan], Trial]
) -> list[Trial]:
    """Trials of the largest size with nothing recomputed, then of less and less memory, up to the first that fits."""
    trials = []
    for level in levels:
        for size in reversed(sizes):
            trials.append(try_plan(StepPlan(size, -(-per_step // size), level)))
            if trials[-1].fits:
                return trials
    return trials


def search(
    sizes: list[int],
    levels: Sequence[str],
    per_step: int,
    seq_lengths: Packs,
    try_plan: Callable[[StepPlan], Trial],
) -> list[Trial]:
    """Trials among which the fastest plan is: larger and larger batches with less and less kept.

    Recomputing only costs time, so it is tried for batches larger than what fits with less of it, and not at all once a
    larger batch gains nothing. Memory grows linearly with the batch's tokens: from two trials the third is foretold,
    and one that can't fit isn't tried. Offloading is the last resort.
    """
    start, trials, fitted = time.perf_counter(), [], 0
    lengths = sorted(map(sum, seq_lengths), reverse=True)
    tokens = {size: int(sum(lengths[:size])) for size in sizes}
    for level in levels:
        if level == OFFLOADED and fitted:
            break
        points: list[Trial] = []
        for size in ladder([size for size in sizes if size > fitted]):
            plan = StepPlan(size, -(-per_step // size), level)
            expected = _expected_bytes(points, tokens, size)
            if expected is not None and expected > points[-1].room:
                trials.append(Trial(plan, fits=False, peak_memory_bytes=expected))
                break
            known = [trial for trial in trials if trial.fits]
            if known and time.perf_counter() - start + _expected_seconds(known[-1], tokens, size) > SECONDS:
                return trials
            trials.append(try_plan(plan))
            if not trials[-1].fits:
                break
            fitted = size
            points.append(trials[-1])
            if len(points) > 1 and points[-1].speed < GAIN * points[-2].speed:
                return trials
        else:
            return trials
    return trials


def ladder(sizes: list[int]) -> list[int]:
    """Those of ascending sizes that are worth a trial each: neighbours are about equally fast. The last is kept."""
    chosen: list[int] = []
    for size in sizes:
        if not chosen or size >= STEP * chosen[-1]:
            chosen.append(size)
    return chosen if not sizes or chosen[-1] == sizes[-1] else [*chosen[:-1], sizes[-1]]


def _best(fitting: list[Trial]) -> Trial:
    """The fastest; and the largest batch among those that are as fast, with the same checkpointing."""
    fastest = max(fitting, key=lambda trial: trial.speed)
    alike = [trial for trial in fitting if trial.plan.checkpointing == fastest.plan.checkpointing]
    near = [trial for trial in alike if trial.speed * GAIN >= fastest.speed]
    return max(near, key=lambda trial: trial.plan.micro_batch)


def _expected_bytes(points: list[Trial], tokens: dict[int, int], size: int) -> int | None:
    """Memory of a size from the last two trials with the same checkpointing, on the line through them."""
    if len(points) < 2:
        return None
    (x1, y1), (x2, y2) = ((tokens[trial.plan.micro_batch], trial.peak) for trial in points[-2:])
    return round(y2 + (y2 - y1) / (x2 - x1) * (tokens[size] - x2))


def _expected_seconds(known: Trial, tokens: dict[int, int], size: int) -> float:
    return tokens[size] / known.speed


def _size_reason(best: Trial, trials: list[Trial], device: str) -> str:
    if device == "cpu":
        return f"about {CPU_TOKENS:,} tokens a forward pass keep a CPU's cores busy"
    timed = [trial for trial in trials if trial.fits]
    if len(timed) == 1:
        return "the only plan that a trial step with the longest packs found room for"
    others = [trial for trial in timed if trial is not best]
    second = max(others, key=lambda trial: trial.speed)
    near = f"as fast as any (within {100 * (GAIN - 1):.0f} %)"
    rank = "the fastest" if best.speed >= second.speed else near
    return (
        f"{rank} of {len(timed)} plans that fit, by trial steps with the longest packs: "
        f"{best.speed:,.0f} tokens/s and {best.peak / 2**30:.1f} of "
        f"{best.room / 2**30:.1f} GiB, against {second.speed:,.0f} tokens/s with {second.plan}"
    )


def _checkpointing_reason(best: Trial, trials: list[Trial], device: str) -> str:
    level = best.plan.checkpointing
    if level == "none":
        return "memory is not short on a CPU at this size" if device == "cpu" else "the activations fit in memory"
    if level == OFFLOADED:
        return "without it not even one pack fits in memory"
    less = [trial for trial in trials if trial.fits and trial.plan.checkpointing != level]
    if less:
        return "the room that it makes serves a larger batch, which is faster"
    return "with less of it not even one pack fits in memory"


# Trying ---------------------------------------------------------------------------------------------------------------


def supported_checkpointing(model: PreTrainedModel | PeftModel, device: str) -> list[str]:
    """The levels of CHECKPOINTING that make sense for a model on a device."""
    if not model.supports_gradient_checkpointing:
        return ["none"]
    return [level for level in CHECKPOINTING if device == "cuda" or level != OFFLOADED]


def apply_checkpointing(model: PreTrainedModel | PeftModel, level: str) -> None:
    """Let training forward passes of `model` keep what `level` says."""
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_disable()
    if level != "none":
        model.activation_checkpointing_enable({"use_reentrant": False}, **(CHECKPOINTING[level] or {}))
        # Without reentry gradients reach the layers anyhow; the first layer's input needs none.
        model.disable_input_require_grads()


class Trials:
    """Tries plans for a model: call with a StepPlan, get a Trial. The model and all random numbers stay as they were.

    `seq_lengths`: token counts of the examples in each pack. `dtype`: of the matmuls. `least_memory`: bytes of the
    smallest card that the plan is for, where that isn't this one.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        seq_lengths: Packs,
        dtype: str,
        device: str,
        least_memory: int | None = None,
    ):
        self.least_memory = least_memory
        self.model, self.dtype, self.device = model, dtype, device
        self.packs = sorted(seq_lengths, key=sum, reverse=True)
        self.bare = bare_model(model)
        self.vocabulary = model.config.get_text_config().vocab_size
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.later = OPTIMIZER_BYTES * trained
        self.fastest = 0.0  # tokens a second of the trials so far
        self.counted: dict[str, float] = {}  # bytes a token kept for the backward pass, by checkpointing

    def __call__(self, plan: StepPlan) -> Trial:
        """Try the plan on made-up tokens in its longest packs."""
        lengths = [int(length) for pack in self.packs[: plan.micro_batch] for length in pack]
        return self._count(plan, sum(lengths)) if self.device == "cpu" else self._measure(plan, lengths)

    def _measure(self, plan: StepPlan, lengths: list[int]) -> Trial:
        """Run steps and see how much memory and time they take."""
        free = hardware.free_memory("cuda") + torch.cuda.memory_reserved()
        total = hardware.total_memory("cuda")
        kept_free = HEADROOM["cuda"] * total + hardware.display_margin() + total - (self.least_memory or total)
        room = int(free - kept_free) - self.later
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with _as_before(self.model, plan.checkpointing), fused_head(self.bare):
            try:
                seconds = self._settled_seconds(lengths)
            except torch.OutOfMemoryError:
                return Trial(plan, fits=False)
            peak = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        return Trial(plan, peak <= room, peak + self.later, sum(lengths) / seconds, room + self.later)

    def warm_up(self) -> None:
        """Have all kernels compiled by a step over the shortest pack, so that no trial is timed with that."""
        if self.device == "cuda":
            out_of_memory = suppress(torch.OutOfMemoryError)  # a trial will say so
            with _as_before(self.model, "none"), fused_head(self.bare), out_of_memory:
                self._seconds([int(length) for length in self.packs[-1]])
            torch.cuda.empty_cache()

    def _settled_seconds(self, lengths: list[int]) -> float:
        """Seconds of a step once it has become no faster."""
        tokens = sum(lengths)
        seconds = self._seconds(lengths)
        if seconds > LONG_STEP and tokens / seconds * 2 > self.fastest > 0:
            self.fastest = max(self.fastest, tokens / seconds)
            return seconds
        for _ in range(MOST_STEPS - 1):
            before, seconds = seconds, self._seconds(lengths)
            if before < SETTLED * seconds:
                seconds = min(before, seconds)
                break
        self.fastest = max(self.fastest, tokens / seconds)
        return seconds

    def _seconds(self, lengths: list[int]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(self.device, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            batch = made_up(lengths, self.vocabulary, self.device)
            if supports_training(self.bare):
                loss = labelled_losses(self.bare, **batch).mean()
            else:  # as TRL computes it: the head at chunks of the labelled positions
                loss = -self.model(**batch, fused_lm_head=True).log_probs.mean()
        loss.backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def _count(self, plan: StepPlan, tokens: int) -> Trial:
        """Count what a few tokens keep for the backward pass: memory grows linearly with tokens."""
        for level in {"none", plan.checkpointing}:
            if level not in self.counted:
                with _as_before(self.model, level):
                    self.counted[level] = self._kept_bytes() / COUNTED_TOKENS
        a_token = self.counted[plan.checkpointing]
        if plan.checkpointing != "none":  # one layer at a time is computed again, and keeps all of it
            a_token += self.counted["none"] / self.model.config.get_text_config().num_hidden_layers
        needed = round(a_token * tokens) + self.later
        free = hardware.free_memory("cpu")
        room = int(free - HEADROOM["cpu"] * free)
        return Trial(plan, needed <= room, needed, None, room)

    def _kept_bytes(self) -> int:
        """Bytes that a forward pass over COUNTED_TOKENS tokens keeps beside the parameters."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = made_up([COUNTED_TOKENS], self.vocabulary, self.device)
        with (
            torch.autocast(self.device, getattr(torch, self.dtype), enabled=self.dtype != "float32"),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            # Held until it is counted: memory that is let go of could be given out twice.
            if has_plain_head(self.bare):
                result = labelled_losses(self.bare, **batch)
            else:
                result = self.model(**batch, use_cache=False).loss
        del result
        return sum(kept.values())


@contextmanager
def _as_before(model: PreTrainedModel | PeftModel, level: str) -> Iterator[None]:
    """In training mode with a level of checkpointing; then modes, gradients and random numbers are as they were."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    with undisturbed():
        model.train()
        apply_checkpointing(model, level)
        try:
            yield
        finally:
            apply_checkpointing(model, "none")
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


@contextmanager
def fused_head(bare: PreTrainedModel) -> Iterator[None]:
    """With TRL's LM head, which its trainer puts on every model."""
    before = bare.__dict__.get("forward")
    add_fused_lm_head(bare, outputs=("log_probs", "entropy", "is_top1"))
    try:
        yield
    finally:
        if before is None:
            del bare.forward
        else:
            bare.forward = before


def made_up(lengths: list[int], vocabulary: int, device: str) -> dict[str, Any]:
    """One row of joined examples of random tokens, all of which carry loss, as TRL's collator makes them of packs."""
    tokens = torch.randint(0, vocabulary, (1, sum(lengths)), device=device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


# Keeping and falling back ---------------------------------------------------------------------------------------------


def save_choices(choices: StepChoices, folder: Path) -> None:
    """Keep the choices beside the checkpoints, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PLAN_FILE) as partial:
        write_json(partial, {name: choice.to_dict() for name, choice in choices.named().items()})


def load_choices(folder: Path) -> StepChoices | None:
    """The choices that an earlier start kept, None where there was none."""
    if not (folder / PLAN_FILE).exists():
        return None
    return StepChoices(**{name: Choice(**stored) for name, stored in read_json(folder / PLAN_FILE).items()})


def smaller(plan: StepPlan, levels: Sequence[str]) -> StepPlan | None:
    """The plan that needs less memory for the same step: the next smaller batch, at one pack more recomputing."""
    below = [size for size in divisors(plan.micro_batch * plan.accumulation) if size < plan.micro_batch]
    if below:
        return replace(plan, micro_batch=below[-1], accumulation=plan.micro_batch * plan.accumulation // below[-1])
    later = levels[levels.index(plan.checkpointing) + 1 :]
    return replace(plan, checkpointing=later[0]) if later else None


def fall_back(choices: StepChoices, levels: Sequence[str], step: int, continued_from: int) -> StepChoices:
    """The choices with the next smaller plan, after memory ran out in the step after `step`.

    `continued_from`: the step of the last whole checkpoint, 0 where there is none. `memory_fallback` tells of it; its
    alternatives are all falls so far. Raises UserError where no smaller plan is left.
    """
    failed = choices.plan
    plan = smaller(failed, levels)
    if plan is None:
        raise UserError(
            f"memory ran out in step {step + 1} with {failed}, and nothing smaller is left; lower "
            "lengths.max_seq_length or train.lora_r, or end other programs that hold memory"
        )
    where = f"the checkpoint of step {continued_from}" if continued_from else "the start"
    earlier = choices.memory_fallback.alternatives if choices.memory_fallback else []
    fall = {
        "step": step + 1,
        "continued_from": continued_from,
        "micro_batch": failed.micro_batch,
        "checkpointing": failed.checkpointing,
    }
    reason = (
        f"memory ran out in step {step + 1} with {failed}; training went on from {where} with {plan}: the same packs a "
        "step in the same order"
    )
    value = SETTING.get(plan.checkpointing, plan.checkpointing)
    micro = choices.micro_batch_size
    return replace(
        choices,
        micro_batch_size=replace(micro, value=plan.micro_batch, reason=_but(micro.reason)),
        gradient_accumulation_steps=replace(choices.gradient_accumulation_steps, value=plan.accumulation),
        gradient_checkpointing=replace(choices.gradient_checkpointing, value=value),
        memory_fallback=Choice(str(plan), reason, [*earlier, fall]),
    )


def planned_speed(choices: StepChoices) -> float | None:
    """Tokens a second of one process by trial steps of the plan itself; None where it wasn't timed."""
    plan = choices.plan
    rows = [
        row["tokens_per_second"]
        for row in choices.micro_batch_size.alternatives
        if row["micro_batch"] == plan.micro_batch and row["checkpointing"] == plan.checkpointing
    ]
    return next((speed for speed in rows if speed), None)


def _but(reason: str) -> str:
    note = "; less since memory ran out"
    return reason if reason.endswith(note) else reason + note
