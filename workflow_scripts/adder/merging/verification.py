"""What a merged model, read back from disk, is held against: base + adapter, on rows that neither was trained on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Never, TypedDict

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from adder.core import hardware, text_model
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from adder.core.safetensors_layout import DTYPES, parameter_count, stored_tensors
from adder.core.stage_spec import Context
from adder.kernels.labelled_loss import labelled_logits_of
from adder.merging import candidate_weights, fresh_process_reply
from adder.merging.fresh_process_reply import GreedyReply
from adder.merging.records import LogitComparison, LogitDifferences, ReplyComparison
from adder.merging.streamed_merge import Deltas
from adder.tokenization.token_table import TokenRow, TokenTable
from adder.training.base_model import bare_model, has_experts

PROOF_ROWS = 16
PROOF_POSITIONS = 1024  # label positions whose logits are compared: 200 MB of them for a vocabulary of 49,152
TOLERANCE = 1e-3  # nats a token; see choose_tolerance
FLIPPED_LOSS = 0.01  # nats a token; see only_routers_flip
APPLIED_WITHIN, APPLIED_ROUTED = 0.05, 0.03  # see is_misapplied, only_routers_flip
REPLY_TOKENS = 32
# What arithmetic in a dtype may add to a difference of logits: between 16 and 32, bf16's numbers are an eighth apart.
ARITHMETIC = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
# Shares of the free memory that a model's weights may take, room being needed for what is computed with them.
GPU_SHARE, MEMORY_SHARE = 0.85, 0.7
BATCH = 2048  # tokens that a model whose layers are loaded one after the other computes at once

Logits = tuple[torch.Tensor, torch.Tensor]  # fp32 (labelled, vocabulary), and the labelled tokens' ids (labelled,)


class LabelledTokens(TypedDict):
    """Token ids, and at each the label: the id, or IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Loaded:
    """A model ready to predict. `by_layers`: its weights come from disk, a layer at a time, in each forward pass."""

    model: PreTrainedModel | PeftModel
    by_layers: bool


def choose_tolerance(wanted: Literal["auto"] | float) -> Choice[float, Never]:
    """Largest mean KL divergence (nats a token) between the merged model and base + adapter.

    The figures in the reason were measured on SmolLM2-135M in bf16, with a trained adapter and with random ones.
    """
    if wanted != "auto":
        return Choice(float(wanted), "as set by merge.tolerance")
    return Choice(
        TOLERANCE,
        "rounding the merged weights to 16 bits moves predictions by 0.0001 to 0.0002 nats a token; a trained "
        "adapter with one layer missing or a scale off by a tenth moves them by 0.002 and more",
    )


def spread_rows(heldout: Path, most_rows: int, most_labels: int) -> list[TokenRow]:
    """Evenly spread held-out rows that carry loss, of at most `most_labels` labels in all."""
    table = TokenTable(heldout)
    rows: list[TokenRow] = []
    positions = 0
    for number in range(0, len(table), max(1, len(table) // most_rows))[:most_rows]:
        row = table.row(number)
        # A long row is cut behind its first labels: causal logits don't depend on what follows.
        labelled = [index for index, label in enumerate(row["labels"]) if index and label != IGNORE_INDEX]
        labelled = labelled[: most_labels - positions]
        if labelled:
            end = labelled[-1] + 1
            rows.append({"id": row["id"], "input_ids": row["input_ids"][:end], "labels": row["labels"][:end]})
            positions += len(labelled)
    return rows


def choose_loading(folder: Path, dtype: torch.dtype, device: str) -> Choice[str, Never]:
    """Whether the weights are held in `dtype` ("whole"), or only a layer's at a time ("by layers"), by free memory.

    The reason doesn't say how much is free: equal inputs give equal files.
    """
    torch.cuda.empty_cache()  # what an earlier model has left; does nothing without a GPU
    needed, free = parameter_count(folder) * dtype.itemsize, hardware.free_memory(device)
    fits = needed < free * (GPU_SHARE if device == "cuda" else MEMORY_SHARE)
    name, where = str(dtype).removeprefix("torch."), "on the GPU" if device == "cuda" else "in memory"
    size = f"{needed / 2**30:.1f} GiB of weights"
    if fits:
        return Choice("whole", f"computed in {name} ({size}, held {where})")
    why = f"{size}, for which there is no room {where}"
    return Choice("by layers", f"computed in {name}, each layer's weights read when its turn comes ({why})")


def load(folder: Path, dtype: torch.dtype, loading: str, device: str) -> Loaded:
    """Load a model directory to compute in `dtype` on `device`, "whole" or "by layers".

    By layers, the weights stay in their file, mapped into memory, and only one decoder layer's are there in `dtype`.
    """
    by_layers = loading == "by layers"
    options: dict[str, Any] = {"dtype": _stored_dtype(folder) if by_layers else dtype}
    if not by_layers and device == "cuda":
        options["device_map"] = device  # straight from the file to the GPU
    model: Any = text_model.load(folder, **options)
    if by_layers:
        layers = _decoder_layers(model)
        _hold_all_but(layers, model, dtype, device)
        for layer in layers:
            _load_when_needed(layer, dtype, device)
    else:
        model.to(device)
    return Loaded(model.eval(), by_layers)


def _stored_dtype(folder: Path) -> torch.dtype:
    largest = max(stored_tensors(folder).values(), key=lambda tensor: tensor.stop - tensor.start)
    return DTYPES[largest.dtype]


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of layers that most of the weights are in."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def _hold_all_but(layers: torch.nn.ModuleList, model: PreTrainedModel, dtype: torch.dtype, device: str) -> None:
    inside = {id(tensor) for tensor in [*layers.parameters(), *layers.buffers()]}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)


def _load_when_needed(layer: torch.nn.Module, dtype: torch.dtype, device: str) -> None:
    """Hold the layer's weights in `dtype` on `device` while it computes, and only then."""
    stored: dict[torch.Tensor, torch.Tensor] = {}

    def enter(module: torch.nn.Module, _inputs: object) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            stored[tensor] = tensor.data
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)

    def leave(_module: torch.nn.Module, _inputs: object, _output: object) -> None:
        for tensor, data in stored.items():
            tensor.data = data
        stored.clear()

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)


@torch.no_grad()
def logits_of(loaded: Loaded, rows: Sequence[LabelledTokens]) -> Iterator[Logits]:
    """Yield for each row the logits (on the CPU) that predict its labelled tokens, and those tokens' ids.

    A model that is loaded by layers computes several rows in one pass, side by side.
    """
    for batch in _batches(rows, BATCH if loaded.by_layers else 0):
        found = labelled_logits_of(loaded.model, [(row["input_ids"], row["labels"]) for row in batch])
        yield from ((logits.cpu(), target.cpu()) for logits, target in found)


def _batches(rows: Sequence[LabelledTokens], most: int) -> list[list[LabelledTokens]]:
    """Rows in their order, as many together as make `most` positions when filled up to the longest; at least one."""
    batches: list[list[LabelledTokens]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row["input_ids"]))
        if not batches or longest * (len(batches[-1]) + 1) > most:
            batches.append([])
            longest = len(row["input_ids"])
        batches[-1].append(row)
    return batches


def row_losses(loaded: Loaded, rows: Sequence[LabelledTokens]) -> list[tuple[float, int]]:
    """(nats in all, labelled tokens) of each row."""
    pairs = logits_of(loaded, rows)
    return [(float(torch.nn.functional.cross_entropy(x, y, reduction="sum")), len(y)) for x, y in pairs]


def compare(
    base: Path,
    adapter: Path,
    model: Path,
    rows: Sequence[TokenRow],
    tolerance: float,
    context: Context,
    before: Deltas | None = None,
) -> LogitComparison:
    """Hold the merged model, read from disk, against PEFT's unmerged adapter on `base`; all logits in fp32.

    `before`: what the base's weights become before the adapter is put beside them. The models are loaded one after the
    other. Raises UserError for logits that aren't finite, a `kl` above `tolerance`, or another reply.
    """
    device, progress = context.device, context.progress
    asked = shortest_prompt(rows)
    progress.line("proof: one reply of the merged model, by a fresh process")
    reply, dtype = reply_of_fresh_process(model, asked, device)
    asked_and_replied: LabelledTokens = {
        "input_ids": asked + reply["input_ids"],
        "labels": [IGNORE_INDEX] * len(asked) + reply["input_ids"],
    }
    loading = choose_loading(base, torch.float32, device)
    progress.line(f"proof: base + adapter on {len(rows)} rows")
    unmerged = load(base, torch.float32, loading.value, device)
    if before:
        assert isinstance(unmerged.model, PreTrainedModel)
        candidate_weights.hold(unmerged.model, base, before, context)
    plain = list(logits_of(unmerged, rows))
    unmerged = replace(unmerged, model=PeftModel.from_pretrained(unmerged.model, adapter).eval())
    *expected, replied = logits_of(unmerged, [*rows, asked_and_replied])
    del unmerged
    progress.line(f"proof: merged model on {len(rows)} rows")
    merged = load(model, torch.float32, loading.value, device)
    found = differences(expected, logits_of(merged, rows), plain)
    routed = has_experts(bare_model(merged.model))
    if not (found["kl"] <= tolerance or (routed and only_routers_flip(found, tolerance))):  # NaN fails as well
        raise UserError(
            f"the merged model isn't base + adapter: their predictions on {len(rows)} held-out rows differ by "
            f"{found['kl']:.2g} nats a token (mean KL divergence), allowed are {tolerance:g} (merge.tolerance)"
        )
    if is_misapplied(found):
        raise UserError(
            f"the merged model isn't base + adapter: of what the adapter changes in the predictions on {len(rows)} "
            f"held-out rows {found['applied']:.0%} is in it"
        )
    # Rounding the weights has moved each logit by as much as max_difference, one up and another one down.
    reloaded = compare_reply(replied[0], reply, 2 * found["max_difference"] + ARITHMETIC[dtype])
    prompt = AutoTokenizer.from_pretrained(model, local_files_only=True).decode(asked)
    return {
        **found,
        "loading": {"value": loading.value, "reason": loading.reason, "alternatives": []},
        "reloaded": {"prompt": prompt, "dtype": dtype, **reloaded},
    }


def only_routers_flip(found: LogitDifferences, tolerance: float) -> bool:
    """Whether a mixture of experts whose mean KL is above `tolerance` differs in a few positions only, and not in loss.

    Where a router has two experts nearly tied, rounding the weights sends a token to the other one, which is as good
    and moves this position's prediction by far more than rounding does elsewhere: the mean is made of a few large
    numbers. What is merged wrongly moves all positions: then the median is above as well, or the adapter's change isn't
    whole. Measured on tiny Mixtral, Qwen3-MoE, Jamba, DeepSeek-V3 and gpt-oss: 99.9 to 100.1 % where it is, 95.4 % and
    less with a scale off by a tenth or more, or one weight or layer left out.
    """
    losses, applied = found["heldout_loss"], found["applied"]
    whole = applied is not None and abs(applied - 1) <= APPLIED_ROUTED
    return found["kl_median"] <= tolerance and whole and abs(losses["merged"] - losses["adapter"]) <= FLIPPED_LOSS


def is_misapplied(found: LogitDifferences) -> bool:
    """Whether more or less than the adapter's change is in the merged model, though its predictions are near enough.

    Of an adapter that changes little a half is near, too. Rounding moves logits in any direction, so that at the median
    position its part in the adapter's own direction is small; a fifth of its size is allowed for it.
    """
    if found["applied"] is None or found["kl"] > 4 * found["base_kl"]:  # rounding is all that can be seen
        return False
    rounding = (found["kl"] / found["base_kl"]) ** 0.5 if found["base_kl"] else 0.0
    return abs(found["applied"] - 1) > APPLIED_WITHIN + rounding / 5


def differences(expected: Sequence[Logits], actual: Iterable[Logits], plain: Sequence[Logits]) -> LogitDifferences:
    """Sum up the logits of base + adapter, merged model and bare base. Raises UserError for some that aren't finite."""
    sums = dict.fromkeys(("difference", "agree", "kl", "base_kl", "merged", "adapter"), 0.0)
    largest, positions, vocabulary = 0.0, 0, expected[0][0].shape[1]
    divergences: list[torch.Tensor] = []
    shares: list[torch.Tensor] = []
    for (before, target), (after, _), (bare, _) in zip(expected, actual, plain, strict=True):
        if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise UserError("the merged model, or base + adapter, computes logits that aren't finite")
        gap = (before - after).abs()
        log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
        wanted = target[:, None]
        largest = max(largest, float(gap.max()))
        positions += len(target)
        shares.append(_applied(before, after, bare))
        sums["difference"] += float(gap.double().sum()) / vocabulary
        sums["agree"] += float((before.argmax(-1) == after.argmax(-1)).sum())
        divergences.append((log_before.exp() * (log_before - log_after)).double().sum(-1))
        sums["kl"] += float(divergences[-1].sum())
        sums["base_kl"] += float((log_before.exp() * (log_before - bare.log_softmax(-1))).double().sum())
        sums["merged"] -= float(log_after.gather(1, wanted).double().sum())
        sums["adapter"] -= float(log_before.gather(1, wanted).double().sum())
    mean = {name: value / positions for name, value in sums.items()}
    applied = torch.cat(shares)
    applied = applied[torch.isfinite(applied)]
    return {
        "positions": positions,
        "max_difference": largest,
        "mean_difference": mean["difference"],
        "top_token_agreement": mean["agree"],
        "kl_median": max(0.0, float(torch.cat(divergences).median())),
        "kl": max(0.0, mean["kl"]),  # of two equal distributions, rounding may leave it a hair below
        "base_kl": max(0.0, mean["base_kl"]),
        "applied": float(applied.median()) if len(applied) else None,
        "heldout_loss": {"merged": mean["merged"], "adapter": mean["adapter"]},
    }


def _applied(before: torch.Tensor, after: torch.Tensor, bare: torch.Tensor) -> torch.Tensor:
    """How far `after` has gone from `bare` to `before` at each position, in their direction; logits, (positions, V).

    A constant added to all logits changes nothing. NaN where `before` is `bare`.
    """
    wanted, found = (logits.double() - bare.double() for logits in (before, after))
    wanted, found = wanted - wanted.mean(-1, keepdim=True), found - found.mean(-1, keepdim=True)
    return (wanted * found).sum(-1) / (wanted * wanted).sum(-1)


def shortest_prompt(rows: Sequence[LabelledTokens]) -> list[int]:
    """The ids that stand before the first labelled token of a row, of the row where they are fewest."""
    prompts = [
        row["input_ids"][: next(index for index, label in enumerate(row["labels"]) if index and label != IGNORE_INDEX)]
        for row in rows
    ]
    return min(prompts, key=len)


def reply_of_fresh_process(model: Path, prompt: list[int], device: str) -> tuple[GreedyReply, str]:
    """The greedy reply of a process that reads the model from disk, and the dtype it computed in.

    That is fp32 where it fits in memory, else the weights' own. Raises UserError where the process fails.
    """
    whole = choose_loading(model, torch.float32, device).value == "whole"
    dtype = str(torch.float32 if whole else _stored_dtype(model)).removeprefix("torch.")
    command = [
        sys.executable,
        "-m",
        fresh_process_reply.__name__,
        str(model),
        dtype,
        device if whole else "auto",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    question = json.dumps({"input_ids": prompt, "max_new_tokens": REPLY_TOKENS})
    done = subprocess.run(command, input=question, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"{model}: a fresh process could not load the merged model and let it reply (exit code {done.returncode}; "
            "its messages are in the stage's log)"
        )
    return json.loads(done.stdout.splitlines()[-1]), dtype


def compare_reply(logits: torch.Tensor, reply: GreedyReply, nearly_tied: float) -> ReplyComparison:
    """Whether the reply is also the greedy one of base + adapter.

    `logits`: those of base + adapter, (tokens of the reply, vocabulary), given the prompt and the reply before each
    token: its greedy reply is the same just if each token is the argmax. Where the two part at a token whose logit is
    less than `nearly_tied` below the largest, that is told and no fault; otherwise UserError is raised.
    """
    ids = torch.tensor(reply["input_ids"])
    gaps = logits.max(-1).values - logits.gather(1, ids[:, None])[:, 0]
    apart = torch.nonzero(logits.argmax(-1) != ids)[:, 0].tolist()
    found: ReplyComparison = {
        "reply": reply["text"],
        "same": not apart,
        "tied": None,
        "counts_as_tied": nearly_tied,
    }
    if not apart:
        return found
    first, gap = apart[0], float(gaps[apart[0]])
    if gap > nearly_tied:
        raise UserError(
            f"the merged model, read from disk by a fresh process, doesn't reply as base + adapter do: at token "
            f"{first + 1} of {reply['text']!r} they prefer another one by {gap:.2g} nats, where {nearly_tied:g} count "
            "as tied"
        )
    return {**found, "tied": {"position": first + 1, "gap": gap}}
