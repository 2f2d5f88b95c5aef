"""One look before the first step, in seconds: does a pack carry loss, does it reach every pair, is there room on disk?

One forward and backward pass over one pack. The model, its gradients and the generators of random numbers are left as
they were, so that a run with it and one without end with the same bytes.
"""

import itertools
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core import hardware
from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from adder.core.rng import undisturbed
from adder.kernels.labelled_loss import mean_loss
from adder.training.base_model import bare_model
from adder.training.layer_names import listed
from adder.training.packed_dataset import Pack
from adder.training.records import DiskRoom, PackPiece, PreflightFigures, ShownPack, TrainingFacts
from adder.training.sampled_replies import decoded
from adder.training.stage import TrainSettings
from adder.training.step_planner import apply_checkpointing

SHOWN_TOKENS = 400
BEFORE_REPLY = 100  # tokens shown before the first that carries loss, where a prompt is long
# A checkpoint holds the trained weights and AdamW's two moments of each, in fp32.
CHECKPOINT_BYTES = 3 * 4
# Of all memory, that a model may take to be held whole where merging compares candidates; a little less than is so.
MERGE_SHARE = 0.6
# fp16 gradients of long packs fall below its smallest number without the scaler that training has.
FP16_SCALE = 2.0**10
EMBEDDINGS = 4096  # of the vocabulary's, that tell what is usual
UNTRAINED = 0.01  # of the usual distance from the mean: two embeddings nearer to each other were never trained apart


@dataclass(frozen=True)
class DiskNeeds:
    """What will be written where: checkpoints, of which `save_total_limit` are kept (0: none are written), to the
    folder `checkpoints`; the merged model, as large as the base in 16 bit (`base_bytes`), to the disk of `results`,
    `copies` of it for a while.
    """

    checkpoints: Path
    save_total_limit: int
    results: Path
    base_bytes: int
    copies: int = 1


def merged_copies(base_bytes: int, method: str, device: str, dtype: str) -> int:
    """How many models the merge will have on the disk at once.

    After `qlora` it compares two candidates: in memory where the whole model has room there, else as files, which are
    there beside each other.
    """
    whole = base_bytes * (2 if dtype == "float32" else 1)
    return 1 if method != "qlora" or whole < MERGE_SHARE * hardware.total_memory(device) else 2


def check(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pack: Pack,
    settings: TrainSettings,
    dtype: str,
    checkpointing: bool,
    facts: TrainingFacts,
    disk: DiskNeeds,
) -> PreflightFigures:
    """Try one pack; return what was seen. Raises UserError where training can't work.

    `pack`: as PackedExamples gives it. `dtype`: of the matmuls. `checkpointing`: whether layers are computed again.

    Stops: no labelled token, nothing to train, a loss or gradient that is no number, no gradient anywhere, a disk that
    is too small. Everything else that looks wrong is for `preflight_warnings` to say.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError(
            "preflight: no parameter of this model is trained; "
            + ("check train.target_modules" if settings.method != "full" else "its weights are all frozen")
        )
    tokens, labelled = len(pack["input_ids"]), int((np.asarray(pack["labels"])[1:] != IGNORE_INDEX).sum())
    if not labelled:
        raise UserError(
            f"preflight: none of the first pack's {tokens} tokens carries loss, so nothing can be learnt from it; "
            "look at tokenize.loss_on, the chat template, and what lengths.truncate cuts off"
        )
    count = sum(parameter.numel() for parameter in trainable.values())
    room = _disk_room(count, disk)
    loss, norms, seconds = _try(model, trainable, pack, dtype, checkpointing)
    vocabulary = model.config.get_text_config().vocab_size
    layers = _by_layer(norms)
    dead = sorted(name for name, norm in layers.items() if norm == 0.0)
    _refuse(loss, layers, dead, dtype, settings)
    return PreflightFigures(
        batch=shown(tokenizer, pack),
        tokens=tokens,
        labelled=labelled,
        labelled_share=labelled / tokens,
        base_loss=loss,
        ln_vocabulary=math.log(vocabulary),
        trainable_parameters=count,
        gradient_norm=math.sqrt(sum(norm**2 for norm in layers.values())),
        layers=len(layers),
        layers_without_gradient=dead,
        untrained_tokens=untrained_tokens(model, tokenizer, np.asarray(pack["input_ids"]).tolist()),
        disk=room,
        seconds=round(seconds, 2),
        estimated_seconds=round(seconds / tokens * facts.tokens_per_step * facts.steps),
    )


def untrained_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> list[str]:
    """The control tokens among `ids` whose input embeddings tell nothing and stay as they are in this training.

    That is: all zeros, the same as another token's, or the mean of all, which is what a library gives to tokens that
    are added to a model. Weights that are spread over several GPUs are not looked at.
    """
    embeddings = cast(Any, model.get_input_embeddings())
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, torch.Tensor) or isinstance(weight, DTensor) or not weight.is_floating_point():
        return []
    if any(parameter.requires_grad for parameter in embeddings.parameters()):
        return []
    vocabulary = cast(dict[str, int], cast(Any, tokenizer).get_added_vocab())
    added = {*tokenizer.all_special_ids, *vocabulary.values()}
    control = sorted(token for token in set(ids) & added if token < len(weight))
    if not control:
        return []
    rows = weight[control].detach().float()
    sample = weight[:: max(1, len(weight) // EMBEDDINGS)].detach().float()
    middle, usual = sample.mean(0), (sample - sample.mean(0)).norm(dim=1).median()
    others = weight[sorted({*control, *(token for token in added if token < len(weight))})].detach().float()
    apart = torch.cdist(rows, others)
    twins = (apart <= UNTRAINED * usual).sum(1) > 1  # each is near to itself
    found = (rows.norm(dim=1) <= UNTRAINED * usual) | ((rows - middle).norm(dim=1) <= UNTRAINED * usual) | twins
    bad = [token for token, is_bad in zip(control, found.tolist(), strict=True) if is_bad]
    if bad == [getattr(embeddings, "padding_idx", None)]:  # torch keeps that one at zero, in training too
        return []
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in bad]


def shown(tokenizer: PreTrainedTokenizerBase, pack: Pack) -> ShownPack:
    """The pack as text: {pieces: [{text, loss: 0 or 1}], from, tokens}, at most SHOWN_TOKENS of it.

    A piece ends where loss begins or ends, and with its example. It starts a little before the first token with loss.
    """
    ids, labels = np.asarray(pack["input_ids"]), np.asarray(pack["labels"])
    carries = labels != IGNORE_INDEX
    carries[0] = False  # nothing predicts it
    start = max(0, int(np.flatnonzero(carries)[0]) - BEFORE_REPLY) if carries.any() else 0
    stop = min(len(ids), start + SHOWN_TOKENS)
    example = np.repeat(np.arange(len(pack["seq_lengths"])), np.asarray(pack["seq_lengths"]))
    changes = np.flatnonzero(np.diff(carries[start:stop]) | (np.diff(example[start:stop]) != 0)) + start + 1
    borders = [start, *changes.tolist(), stop]
    pieces = [
        PackPiece(text=decoded(tokenizer, ids[a:b].tolist()), loss=int(carries[a]), example=int(example[a]))
        for a, b in itertools.pairwise(borders)
    ]
    return {"pieces": pieces, "from": start, "tokens": len(ids)}


def _try(
    model: PreTrainedModel | PeftModel,
    trainable: dict[str, torch.nn.Parameter],
    pack: Pack,
    dtype: str,
    checkpointing: bool,
) -> tuple[float, dict[str, float | None], float]:
    """Mean loss (nats) of the pack, the norm of each trainable parameter's gradient (None without one), seconds."""
    device = next(model.parameters()).device
    # TRL's collator, as in training: it is what keeps the examples of a pack apart.
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([dict(pack)])
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    bare = bare_model(model)
    scale = FP16_SCALE if dtype == "float16" else 1.0
    with undisturbed(), as_in_training(model, checkpointing), _gradients_kept(model):
        _synchronize(device)
        start = time.perf_counter()
        with torch.enable_grad(), torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = mean_loss(bare, batch)
        value = loss.item()
        if math.isfinite(value):
            (loss * scale).backward()
        _synchronize(device)
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
def as_in_training(model: PreTrainedModel | PeftModel, checkpointing: bool) -> Iterator[None]:
    """Training mode but for dropout, with all layers recomputed if `checkpointing` and none is yet; then as it was."""
    modes = {module: module.training for module in model.modules()}
    switch = checkpointing and not getattr(model, "is_activation_checkpointing", False)
    model.train()
    for module in modes:
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if switch:
        apply_checkpointing(model, "all layers")
    try:
        yield
    finally:
        if switch:
            apply_checkpointing(model, "none")
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


def _refuse(loss: float, layers: dict[str, float], dead: list[str], dtype: str, settings: TrainSettings) -> None:
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
        raise UserError(f"preflight: the gradient of the first pack is no number in {listed(broken)}")
    if len(dead) == len(layers):
        raise UserError(
            "preflight: no trained layer gets a gradient from the first pack, so the model would stay as it is; "
            + ("check train.target_modules and train.lora_alpha" if settings.method != "full" else "report this")
        )


def _disk_room(trained_parameters: int, disk: DiskNeeds) -> dict[str, DiskRoom]:
    """Room that checkpoints and merged model take, and what is free. Raises UserError where it isn't enough.

    One checkpoint more than are kept exists while it is written; those of an interrupted run make room for new ones.
    A quota is not seen.
    """
    limit, folder = disk.save_total_limit, disk.checkpoints
    held = sum(path.stat().st_size for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    needs = {
        "checkpoints": max(0, (limit + 1) * trained_parameters * CHECKPOINT_BYTES - held) if limit else 0,
        "merged_model": disk.copies * disk.base_bytes,
    }
    places = {"checkpoints": _existing(folder), "merged_model": _existing(disk.results)}
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
    return {name: DiskRoom(needed_bytes=needs[name], free_bytes=free[name]) for name in needs}


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
