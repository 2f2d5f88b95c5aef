"""One look before the first step, in seconds: does a pack carry loss, does it reach every pair, is there room on disk?

One forward and backward pass over one pack. The model, its gradients and the generators of random numbers are left as
they were, so that a run with it and one without end with the same bytes.
"""

import itertools
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.errors import UserError
from adder.core.rng import undisturbed
from adder.kernels.labelled_loss import mean_loss
from adder.training import step_planner

IGNORED = -100
SHOWN_TOKENS = 400
BEFORE_REPLY = 100  # tokens shown before the first that carries loss, where a prompt is long
LISTED = 20  # layers named in a warning
# A checkpoint holds the trained weights and AdamW's two moments of each, in fp32.
CHECKPOINT_BYTES = 3 * 4
# A model that knows nothing loses ln(vocabulary) nats a token; one more is worse than guessing by a factor of e.
MARGIN = 1.0
LEAST_LABELLED = 0.01
# fp16 gradients of long packs fall below its smallest number without the scaler that training has.
FP16_SCALE = 2.0**10


def check(model: torch.nn.Module, tokenizer, pack: dict, settings: dict, plan: dict, facts: dict) -> dict:
    """Try one pack; return what was seen, for train.json. Raises UserError where training can't work.

    `pack`: {input_ids, labels, seq_lengths} (int64 arrays), as PackedExamples gives it. `settings`: those of training.
    `plan`: the choices of training by name; its compute_dtype and gradient_checkpointing are used. `facts`:
    {steps: optimizer steps in all, tokens_per_step: tokens of an average step, checkpoints: folder that they go to,
    save_total_limit: how many are kept (0: none are written), results: folder that the merged model goes to,
    base_bytes: size of the base model in 16 bit}.

    Stops: no labelled token, nothing to train, a loss or gradient that is no number, no gradient anywhere, a disk that
    is too small. Everything else that looks wrong is a sentence in `warnings`.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError(
            "preflight: no parameter of this model is trained; "
            + ("check train.target_modules" if settings["method"] != "full" else "its weights are all frozen")
        )
    tokens, labelled = len(pack["input_ids"]), int((np.asarray(pack["labels"])[1:] != IGNORED).sum())
    if not labelled:
        raise UserError(
            f"preflight: none of the first pack's {tokens} tokens carries loss, so nothing can be learnt from it; "
            "look at tokenize.loss_on, the chat template, and what lengths.truncate cuts off"
        )
    disk = _disk(sum(parameter.numel() for parameter in trainable.values()), facts)
    loss, norms, seconds = _try(model, trainable, pack, plan)
    vocabulary = model.config.get_text_config().vocab_size
    layers = _by_layer(norms)
    dead = sorted(name for name, norm in layers.items() if norm == 0.0)
    _refuse(loss, layers, dead, plan["compute_dtype"].value, settings)
    found = {
        "batch": shown(tokenizer, pack),
        "tokens": tokens,
        "labelled": labelled,
        "labelled_share": labelled / tokens,
        "base_loss": loss,
        "ln_vocabulary": math.log(vocabulary),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable.values()),
        "gradient_norm": math.sqrt(sum(norm**2 for norm in layers.values())),
        "layers": len(layers),
        "layers_without_gradient": dead,
        "disk": disk,
        "seconds": round(seconds, 2),
        "estimated_seconds": round(seconds / tokens * facts["tokens_per_step"] * facts["steps"]),
    }
    return found | {"estimate": _estimate(found["estimated_seconds"], facts), "warnings": _warnings(found)}


def shown(tokenizer, pack: dict) -> dict:
    """The pack as text: {pieces: [{text, loss: 0 or 1}], from, tokens}, at most SHOWN_TOKENS of it.

    A piece ends where loss begins or ends, and with its example. It starts a little before the first token with loss.
    """
    ids, labels = np.asarray(pack["input_ids"]), np.asarray(pack["labels"])
    carries = labels != IGNORED
    carries[0] = False  # nothing predicts it
    start = max(0, int(np.flatnonzero(carries)[0]) - BEFORE_REPLY) if carries.any() else 0
    stop = min(len(ids), start + SHOWN_TOKENS)
    example = np.repeat(np.arange(len(pack["seq_lengths"])), np.asarray(pack["seq_lengths"]))
    changes = np.flatnonzero(np.diff(carries[start:stop]) | (np.diff(example[start:stop]) != 0)) + start + 1
    borders = [start, *changes.tolist(), stop]
    pieces = [
        {"text": tokenizer.decode(ids[a:b].tolist()), "loss": int(carries[a]), "example": int(example[a])}
        for a, b in itertools.pairwise(borders)
    ]
    return {"pieces": pieces, "from": start, "tokens": len(ids)}


def _try(model, trainable: dict, pack: dict, plan: dict) -> tuple[float, dict[str, float | None], float]:
    """Mean loss (nats) of the pack, the norm of each trainable parameter's gradient (None without one), seconds."""
    dtype, device = plan["compute_dtype"].value, next(model.parameters()).device
    # TRL's collator, as in training: it is what keeps the examples of a pack apart.
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([dict(pack)])
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    scale = FP16_SCALE if dtype == "float16" else 1.0
    with undisturbed(), as_in_training(model, plan["gradient_checkpointing"].value), _gradients_kept(model):
        _wait(device)
        start = time.perf_counter()
        with torch.enable_grad(), torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = mean_loss(bare, batch)
        value = loss.item()
        if math.isfinite(value):
            (loss * scale).backward()
        _wait(device)
        seconds = time.perf_counter() - start
        norms = {
            name: None if parameter.grad is None else _norm(parameter.grad) / scale
            for name, parameter in trainable.items()
        }
    return value, norms, seconds


def _norm(gradient: torch.Tensor) -> float:
    norm = gradient.float().norm()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@contextmanager
def as_in_training(model: torch.nn.Module, checkpointing: bool) -> Iterator[None]:
    """Training mode but for dropout, with all layers recomputed if `checkpointing` and none is yet; then as it was."""
    modes = {module: module.training for module in model.modules()}
    switch = checkpointing and not getattr(model, "is_activation_checkpointing", False)
    model.train()
    for module in modes:
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if switch:
        step_planner.apply(model, "all layers")
    try:
        yield
    finally:
        if switch:
            step_planner.apply(model, "none")
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _gradients_kept(model: torch.nn.Module) -> Iterator[None]:
    """Gradients are collected anew inside and put back after."""
    before = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


def _by_layer(norms: dict[str, float | None]) -> dict[str, float]:
    """Norm of the gradient of each trained layer: of A and B of a LoRA pair together, since B alone begins at zero."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        layer = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        layer = layer.removeprefix("base_model.model.")
        squares[layer] = squares.get(layer, 0.0) + (norm or 0.0) ** 2
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def _refuse(loss: float, layers: dict[str, float], dead: list[str], dtype: str, settings: dict) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"preflight: the loss of the untrained model on the first pack is {loss}. "
            + (
                "float16 overflows in some models: set train.compute_dtype: bfloat16 or float32"
                if dtype == "float16"
                else "The base model's weights are damaged, or its files don't belong together"
            )
        )
    # In fp16 the scaler of the training skips such a step.
    if dtype != "float16" and not all(map(math.isfinite, layers.values())):
        broken = sorted(name for name, norm in layers.items() if not math.isfinite(norm))
        raise UserError(f"preflight: the gradient of the first pack is no number in {_named(broken)}")
    if len(dead) == len(layers):
        raise UserError(
            "preflight: no trained layer gets a gradient from the first pack, so the model would stay as it is; "
            + ("check train.target_modules and train.lora_alpha" if settings["method"] != "full" else "report this")
        )


def _warnings(found: dict) -> list[str]:
    loss, uniform, dead = found["base_loss"], found["ln_vocabulary"], found["layers_without_gradient"]
    warnings = []
    if loss > uniform + MARGIN:
        warnings.append(
            f"the base's loss on the first pack is {loss:.2f}, worse than guessing (ln of the vocabulary is "
            f"{uniform:.2f}): the tokenizer or the chat template is not this model's"
        )
    if dead:
        warnings.append(
            f"{len(dead)} of {found['layers']} trained layers get no gradient from the first pack: {_named(dead)}; "
            "they learn nothing unless other packs reach them (an expert that no token was sent to)"
        )
    if found["labelled_share"] < LEAST_LABELLED:
        warnings.append(
            f"{found['labelled']} of the first pack's {found['tokens']:,} tokens carry loss "
            f"({100 * found['labelled_share']:.2f} %): nearly all computing goes into prompts; shorten them, or look "
            "at tokenize.loss_on"
        )
    return warnings


def _disk(parameters: int, facts: dict) -> dict:
    """Room that checkpoints and merged model take, and what is free. Raises UserError where it isn't enough.

    One checkpoint more than are kept exists while it is written; those of an interrupted run make room for new ones.
    A quota is not seen.
    """
    limit, folder = facts["save_total_limit"], Path(facts["checkpoints"])
    held = sum(path.stat().st_size for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    needs = {
        "checkpoints": max(0, (limit + 1) * parameters * CHECKPOINT_BYTES - held) if limit else 0,
        "merged_model": facts["base_bytes"],
    }
    places = {"checkpoints": _existing(folder), "merged_model": _existing(Path(facts["results"]))}
    by_disk: dict[int, list[str]] = {}
    for name, place in places.items():
        by_disk.setdefault(place.stat().st_dev, []).append(name)
    free = {name: shutil.disk_usage(place).free for name, place in places.items()}
    for names in by_disk.values():
        needed, room = sum(needs[name] for name in names), free[names[0]]
        if needed > room:
            what = {
                "checkpoints": f"{limit + 1} checkpoints ({needs['checkpoints'] / 1e9:,.1f} GB; "
                "runtime.save_total_limit, or runtime.checkpoints: 0 for none)",
                "merged_model": f"the merged model ({needs['merged_model'] / 1e9:,.1f} GB)",
            }
            raise UserError(
                f"preflight: the disk of {places[names[0]]} has {room / 1e9:,.1f} GB free, and "
                f"{' and '.join(what[name] for name in names)} take about {needed / 1e9:,.1f} GB; make room there"
            )
    return {name: {"needed_bytes": needs[name], "free_bytes": free[name]} for name in needs}


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _estimate(seconds: float, facts: dict) -> str:
    """Roughly how long the steps take, in words: whatever else the machine did during one pass is in it."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            words = f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
            break
    else:
        words = f"{max(1, round(seconds))} seconds"
    steps = f"{facts['steps']:,} steps"
    return f"roughly {words} for {steps}, by the time of one pack; evaluations and checkpoints not counted"


def _named(layers: list[str]) -> str:
    rest = len(layers) - LISTED
    return ", ".join(layers[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
