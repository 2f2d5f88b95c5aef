"""Before training: does a pack give each example what it gets alone, is attention causal, and is it the model's own?

Many architectures break one of these without an error: layers that don't pass the examples' boundaries on, recurrent
states that run through a pack, attention outside of transformers' interface, which then has no causal mask. So it is
tried, on pieces of the first pack and on the model itself, with its adapter. Random numbers, gradients, modes and
weights are left as they were.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core import hardware
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from adder.core.rng import undisturbed
from adder.kernels.fused_lora import attach as fused_lora
from adder.kernels.labelled_loss import labelled_losses, supports_training
from adder.kernels.one_at_a_time import compute_one_at_a_time
from adder.training.base_model import bare_model, has_experts, parameter_count
from adder.training.packed_dataset import Pack
from adder.training.step_planner import fused_head

# Pieces of the first pack's examples that are tried, and tokens of each: a few hundred in all.
PIECES, PIECE_TOKENS, SHORTEST = 2, 128, 8
# Gradients are compared for parameters of up to so many values, and so many in all: all of an adapter's.
COMPARED_VALUES, COMPARED_IN_ALL = 2**24, 2**26
# How it calls the number of tokens that a layer's attention reaches back.
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")
# Of the free memory that eager attention beyond a window may take; multiplications that a CPU does for it in seconds.
WINDOW_SHARE, CPU_PRODUCTS = 0.3, 2e12
# Of a mixture of experts' rounding, up to which a change by tokens that aren't seen is taken for rounding too.
ROUNDING_OF_EXPERTS = 3.0


@dataclass(frozen=True)
class Tolerances:
    """How far two right ways of computing may be apart.

    unseen: nats of one token, by other tokens that it doesn't see; shapes are the same, so that it is exactly nothing
    but in a mixture of experts. mean_loss: nats, mean of absolute differences, by other shapes or another attention.
    gradient: norm of the difference, relative.
    """

    unseen: float
    mean_loss: float
    gradient: float


# Measured with SmolLM2-135M on a CPU: 5e-6 nats and 3e-7 of the gradient in fp32; in bf16 0.065 nats and 3 %. What the
# check is for comes to tenths of nats and tens of percent; what is less, as of a model that has hardly learnt anything,
# is found by `unseen`, which has no rounding.
FULL = Tolerances(unseen=1e-5, mean_loss=2e-3, gradient=1e-2)
HALF = Tolerances(unseen=1e-3, mean_loss=0.2, gradient=0.2)


@dataclass(frozen=True)
class Differences:
    """What was measured, losses in nats of a token.

    unseen, unseen_mean: the worst and the mean change of the losses of first halves when the second half of every
    example in the pack has other tokens. later: the same of one example alone, None where `unseen` is nothing. alone:
    mean absolute difference between packed and alone. gradient: of the trained weights, packed and alone; relative
    norm, None where it wasn't taken. eager: mean absolute difference between training's losses and those of the model's
    own forward with its eager attention. broken: whether that forward gives no number at all, so that nothing can be
    compared; preflight refuses such a model.
    """

    unseen: float
    unseen_mean: float
    later: float | None
    alone: float
    gradient: float | None
    eager: float
    broken: bool = False


def tolerances(dtype: str) -> Tolerances:
    """For a dtype of the matmuls."""
    return FULL if dtype == "float32" else HALF


def choose_isolation(
    model: PreTrainedModel | PeftModel,
    pack: Pack,
    dtype: str,
    attention: Choice,
    sharded: bool = False,
    longest: NDArray[np.int64] | None = None,
) -> Choice:
    """Leave the model as it can be trained rightly; return its attention, with the reason where it is another.

    Tried in turn: packs by the attention that the model was loaded with (`attention`, returned as it is); each example
    by itself with transformers' own attention, sdpa where the architecture has it, then eager. `dtype`: of the matmuls.
    `sharded`: whether several processes hold the weights together, which must then compute in step. `longest`: token
    ids of the longest example, on which windows of the model's attention are tried where it is longer than one.

    Raises UserError where none is right.
    """
    bare = bare_model(model)
    found = problem(model, pack, dtype, sharded, longest) or _positions_by_pack(bare, longest)
    if found is None:
        return attention
    name = type(bare).__name__
    if sharded:
        raise UserError(
            f"model.source: {name} can't be trained on packs ({found}), and one example at a time GPUs that share its "
            "weights would wait for each other forever; set runtime.sharding: ddp or runtime.gpus: 1"
        )
    compute_one_at_a_time(bare)
    last = found
    for own in ["sdpa", "eager"] if getattr(bare, "_supports_sdpa", False) else ["eager"]:
        set_attention(bare, own)
        last = problem(model, pack, dtype, sharded, longest)
        if last is None:
            reason = f"packs are not computed at once, since {name} would compute them wrongly: {found}"
            refused = {"attention": attention.value, "not_used_because": found}
            return Choice(f"{own}, one example at a time", reason, [refused])
    raise UserError(f"model.source: {name} can't be trained rightly here: {last}; choose another architecture")


def problem(
    model: PreTrainedModel | PeftModel,
    pack: Pack,
    dtype: str,
    sharded: bool = False,
    longest: NDArray[np.int64] | None = None,
) -> str | None:
    """What is wrong with how the model computes packs, None where nothing is; see choose_isolation."""
    try:
        found = measure(model, pack, dtype, with_gradients=not sharded)
        wrong = verdict(found, tolerances(dtype), has_experts(bare_model(model)))
        # Whether there is room is for each process to find, and those that share weights must compute in step.
        if wrong or longest is None or sharded:
            return wrong
        return problem_beyond_window(model, longest, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models refuse a pack in any way that they like
        return f"its code fails on a pack with {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def problem_beyond_window(model: PreTrainedModel | PeftModel, longest: NDArray[np.int64], dtype: str) -> str | None:
    """What is wrong with tokens that stand further from their example's beginning than a window of the attention.

    By their losses in a pack and those of the model's own forward with its eager attention. None where nothing is,
    where no example is that long, and where there is no room for eager attention over it.
    """
    bare = bare_model(model)
    window = window_of(bare)
    if window is None or len(longest) < window + SHORTEST or not _has_room(bare, window + PIECE_TOKENS):
        return None
    piece = longest[: window + PIECE_TOKENS]
    autocast = torch.autocast(bare.device.type, getattr(torch, dtype), enabled=dtype != "float32")
    with undisturbed(), evaluating(model), autocast, torch.no_grad():
        packed = _losses_and_gradient(bare, [piece[:SHORTEST], piece], [])[0][1]
        with attention_by(bare, "eager"), _unfused(model):
            eager = _own_losses(bare, torch.from_numpy(piece)).cpu()
    apart = (packed - eager)[window:].abs().mean().item()
    if not torch.isfinite(eager).all() or apart <= tolerances(dtype).mean_loss:
        return None
    return (
        f"beyond its window of {window:,} tokens its losses are {apart:.2g} nats a token off those of the "
        "architecture's own forward pass with eager attention"
    )


def _positions_by_pack(bare: PreTrainedModel, longest: NDArray[np.int64] | None) -> str | None:
    """What is wrong where an example's positions are others beside one that is longer than the model's first context.

    LongRoPE has two sets of frequencies, and transformers takes one of them for all of a pack, by its longest example.
    """
    config = bare.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    first = min((kind.get("original_max_position_embeddings") or np.inf for kind in kinds), default=np.inf)
    if longest is None or len(longest) <= first:
        return None
    return f"beside an example of more than {first:,} tokens, positions of all in its pack are scaled as its own are"


def window_of(bare: PreTrainedModel) -> int | None:
    """Tokens that some layer's attention reaches back, the fewest; None where all of them reach to the beginning."""
    config = bare.config.get_text_config()
    names = [name for name in WINDOWS if name != "sliding_window" or getattr(config, "use_sliding_window", True)]
    found = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 1]
    return min(found, default=None)


def _has_room(bare: PreTrainedModel, tokens: int) -> bool:
    """Whether eager attention over so many tokens has room, and on a CPU takes seconds rather than minutes."""
    heads = getattr(bare.config.get_text_config(), "num_attention_heads", None) or 1
    device = bare.device.type
    if device == "cpu" and tokens * parameter_count(bare) > CPU_PRODUCTS:
        return False
    return 3 * 4 * heads * tokens**2 <= WINDOW_SHARE * hardware.free_memory(device)


def verdict(found: Differences, most: Tolerances, experts: bool) -> str | None:
    """What is wrong, in words; None where all differences are within rounding. NaN is wrong too, unless the model's
    own forward gives nothing else.
    """
    if found.broken:
        return None
    change = found.unseen_mean if experts else found.unseen
    allowed = max(most.unseen, ROUNDING_OF_EXPERTS * found.eager) if experts else most.unseen
    if found.later is not None and not (change <= allowed or found.later <= allowed):
        return f"a token's loss changes by up to {found.later:.2g} nats when tokens behind it do"
    if not found.eager <= most.mean_loss:
        return (
            f"its losses are {found.eager:.2g} nats a token off those of the architecture's own forward pass with "
            "eager attention"
        )
    if not change <= allowed:
        return f"a token's loss changes by up to {found.unseen:.2g} nats with other examples of its pack"
    if not found.alone <= most.mean_loss:
        return f"in a pack an example's losses are {found.alone:.2g} nats a token off those that it has alone"
    if found.gradient is not None and not found.gradient <= most.gradient:
        return f"gradients of a pack are {found.gradient:.0%} off those of its examples alone"
    return None


def measure(model: PreTrainedModel | PeftModel, pack: Pack, dtype: str, with_gradients: bool = True) -> Differences:
    """Compute pieces of the pack packed and alone, with other tokens in places that must not be seen, and eagerly.

    Every token carries loss here. `dtype`: of the matmuls. Raises whatever the model raises.
    """
    bare = bare_model(model)
    pieces = pieces_of(pack)
    changed = [with_other_tail(piece) for piece in pieces]
    weights = compared_parameters(model) if with_gradients else []
    autocast = torch.autocast(bare.device.type, getattr(torch, dtype), enabled=dtype != "float32")
    with undisturbed(), evaluating(model), autocast:
        packed, packed_gradient = _losses_and_gradient(bare, pieces, weights)
        hidden, _ = _losses_and_gradient(bare, changed, [])
        by_itself = [_losses_and_gradient(bare, [piece], weights) for piece in pieces]
        alone = [losses[0] for losses, _ in by_itself]
        change = _differences(_heads(hidden, pieces), _heads(packed, pieces))
        later = None
        if change.max() != 0:
            ahead = [_losses_and_gradient(bare, [piece], [])[0][0] for piece in changed]
            later = _differences(_heads(ahead, pieces), _heads(alone, pieces)).max().item()
        with attention_by(bare, "eager"), _unfused(model), torch.no_grad():
            eager = _own_losses(bare, torch.from_numpy(pieces[0]))
    return Differences(
        unseen=change.max().item(),
        unseen_mean=change.mean().item(),
        later=later,
        alone=_differences(packed, alone).mean().item(),
        gradient=_relative(packed_gradient, [gradient for _, gradient in by_itself]) if weights else None,
        eager=_differences(alone[:1], [eager.cpu()]).mean().item(),
        broken=not bool(torch.isfinite(eager).all()),
    )


# The pieces -----------------------------------------------------------------------------------------------------------


def pieces_of(pack: Pack) -> list[NDArray[np.int64]]:
    """Token ids of examples of the pack, cut to PIECE_TOKENS; of a single one its halves, a short one twice."""
    ids = np.asarray(pack["input_ids"])
    examples = np.split(ids, np.cumsum(pack["seq_lengths"])[:-1])
    pieces = [example[:PIECE_TOKENS] for example in examples if len(example) >= SHORTEST][:PIECES]
    if len(pieces) > 1:
        return pieces
    longest = max(examples, key=len)[: 2 * PIECE_TOKENS]
    if len(longest) < 2 * SHORTEST:
        return [np.resize(longest, SHORTEST)] * 2
    return [longest[: len(longest) // 2], longest[len(longest) // 2 :]]


def with_other_tail(piece: NDArray[np.int64]) -> NDArray[np.int64]:
    """The piece with other tokens from its middle on: each becomes another one that occurs in it."""
    known, places = np.unique(piece, return_inverse=True)
    other = known[(places + 1) % len(known)] if len(known) > 1 else np.where(piece > 0, piece - 1, 1)
    middle = len(piece) // 2
    return np.concatenate([piece[:middle], other[middle:]])


# What is computed -----------------------------------------------------------------------------------------------------


def _losses_and_gradient(
    bare: PreTrainedModel, pieces: list[NDArray[np.int64]], weights: list[torch.nn.Parameter]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses of each piece's tokens but the first, as training computes them, and the gradients of their sum."""
    # TRL's collator, as in training: it is what keeps the examples of a pack apart.
    lengths = [len(piece) for piece in pieces]
    ids = np.concatenate(pieces)
    row = {"input_ids": ids, "labels": ids, "seq_lengths": np.array(lengths)}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    batch = {name: v.to(bare.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    with torch.set_grad_enabled(bool(weights)):
        if supports_training(bare):
            losses = labelled_losses(bare, **batch)
        else:
            with fused_head(bare):
                scores = bare(**batch, fused_lm_head=True).log_probs
            losses = -scores[batch["labels"][:, 1:] != IGNORE_INDEX]
        gradient = torch.autograd.grad(losses.sum(), weights, allow_unused=True) if weights else ()
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradient, strict=False)]
    return list(losses.detach().float().cpu().split([length - 1 for length in lengths])), filled


def _own_losses(bare: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Losses of all tokens but the first, from the logits of the model's own forward. ids: (tokens,)."""
    logits = bare(input_ids=ids[None].to(bare.device), use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:].to(logits.device), reduction="none")


def compared_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained weights whose gradients are compared: all of an adapter's, the smaller ones of a full training."""
    chosen: list[torch.nn.Parameter] = []
    room = COMPARED_IN_ALL
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel() <= min(COMPARED_VALUES, room):
            chosen.append(parameter)
            room -= parameter.numel()
    return chosen


def _unfused(model: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    """Within it PEFT's own layers compute, where LoRA is fused into the base's matmuls."""
    return fused_lora.suspended(model) if isinstance(model, PeftModel) else nullcontext()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; then the modes are as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def set_attention(bare: PreTrainedModel, name: str) -> None:
    """Have the model compute its attention by `name`, also where transformers doesn't let one change it.

    Models outside of transformers' attention interface compute as they were written, but make their masks by this name.
    """
    if type(bare)._can_set_attn_implementation():
        bare.set_attn_implementation(name)
    for module in bare.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = name


@contextmanager
def attention_by(bare: PreTrainedModel, name: str) -> Iterator[None]:
    """Attention by `name` inside, then as before."""
    configs = {id(m.config): m.config for m in bare.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    set_attention(bare, name)
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


# Comparisons ----------------------------------------------------------------------------------------------------------


def _heads(losses: list[torch.Tensor], pieces: list[NDArray[np.int64]]) -> list[torch.Tensor]:
    """The losses of each piece's tokens before its middle: those that with_other_tail doesn't change."""
    return [own[: len(piece) // 2 - 1] for own, piece in zip(losses, pieces, strict=True)]


def _differences(found: list[torch.Tensor], expected: list[torch.Tensor]) -> torch.Tensor:
    """Absolute differences, all in one row."""
    return (torch.cat(found) - torch.cat(expected)).abs()


def _relative(packed: list[torch.Tensor], alone: list[list[torch.Tensor]]) -> float:
    """Norm of the difference between the packed gradient and the sum of those alone, relative to the latter's."""
    difference, size = 0.0, 0.0
    for number, own in enumerate(packed):
        together = torch.stack([gradients[number] for gradients in alone]).sum(0)
        difference += (own - together).float().norm().item() ** 2
        size += together.float().norm().item() ** 2
    return (difference / size) ** 0.5 if size else 0.0
