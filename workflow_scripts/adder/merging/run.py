"""Merge the adapter into the base's weights, and prove that the result is base + adapter."""

import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from adder.core import hardware, precision, text_model
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.safetensors_layout import shard_files, stored_tensors
from adder.core.stage_spec import Context
from adder.merging import base_choice
from adder.merging.records import BaseCandidate, FullProof, LogitComparison, MergeProof, ProofRecord, WeightCheck
from adder.merging.stage import MergeSettings
from adder.merging.streamed_merge import Deltas, check_weights, merge_weights
from adder.merging.trained_tensors import trained_tensors
from adder.merging.verification import PROOF_POSITIONS, PROOF_ROWS, choose_tolerance, compare, spread_rows
from adder.merging.weight_deltas import LoraDelta, is_nothing, read_adapter, share_tied

# Beside weights, config and tokenizer, what belongs to a model and must travel with it.
KEPT_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*processor_config.json")


@dataclass(frozen=True)
class MergeInputs:
    """Folders of the stages that are read.

    train: with `adapter/`, or `model/` of a full training, which is taken as it is. model: the base. format: the groups
    of the held-out rows.
    """

    train: Path
    model: Path
    tokenize: Path
    format: Path


class MergeSummary(TypedDict):
    """A few figures for the stage's record; of a full training there are none."""

    kl: NotRequired[float]
    tolerance: NotRequired[float]
    adapted_weights: NotRequired[int]
    changed_weights: NotRequired[int]
    base: NotRequired[str]


@dataclass(frozen=True)
class Merged:
    """What was merged: the base's choice (None where there is none), all that then changes in the original base's
    files, and what of that was there before the adapter.
    """

    choice: Choice[str, BaseCandidate] | None
    deltas: Deltas
    before: Deltas


def run(settings: MergeSettings, inputs: MergeInputs, out: Path, context: Context) -> MergeSummary:
    """Write the merged model directory `model/` and its `proof.json` into `out`.

    Raises UserError, leaving no model, when the proof doesn't hold or the adapter is of a kind that can't be merged.
    """
    hardware.use_threads(context.threads)
    base, model = inputs.model / "model", out / "model"
    model.mkdir()
    try:
        if (inputs.train / "adapter").is_dir():
            proof = _merge(settings, inputs, base, model, context)
        else:
            proof = _take_full(inputs.train / "model", base, model, context)
            shutil.copyfile(base / "config.json", model / "config.json")
            _write_companions(inputs, base, model)
    except UserError:
        shutil.rmtree(model)
        raise
    write_json(out / "proof.json", proof)
    context.progress.say(proof["reason"])
    return _summary(proof)


def _summary(proof: ProofRecord) -> MergeSummary:
    if "method" in proof:
        return {}
    summary: MergeSummary = {
        "tolerance": proof["tolerance"],
        "adapted_weights": proof["adapted_weights"],
        "changed_weights": proof["changed_weights"],
    }
    if "kl" in proof:
        summary["kl"] = proof["kl"]
    if proof["base"]:
        summary["base"] = proof["base"]["value"]
    return summary


def _merge(settings: MergeSettings, inputs: MergeInputs, base: Path, model: Path, context: Context) -> MergeProof:
    adapter, heldout = inputs.train / "adapter", inputs.tokenize / "heldout.arrow"
    deltas = _on_disk(read_adapter(adapter), base, adapter)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        merged = _merge_into_chosen(settings, inputs, deltas, model, Path(folder), context)
    shutil.copyfile(base / "config.json", model / "config.json")
    _write_companions(inputs, base, model)
    rows = spread_rows(heldout, PROOF_ROWS, PROOF_POSITIONS)
    tolerance = choose_tolerance(settings.tolerance)
    predictions: LogitComparison | None = None
    with ThreadPoolExecutor(1) as beside:
        checking = beside.submit(check_weights, base, model, merged.deltas, context)
        if context.device == "cpu":  # where both would wait for the same cores
            _refuse_unchanged(checking.result(), deltas, adapter)
        if rows:
            predictions = compare(base, adapter, model, rows, tolerance.value, context, merged.before)
        weights = checking.result()
    _refuse_unchanged(weights, deltas, adapter)
    choice = merged.choice
    proof: MergeProof = {
        **weights,
        "tolerance": tolerance.value,
        "tolerance_reason": tolerance.reason,
        "checked": bool(rows),
        "rows": len(rows),
        "base": choice and {"value": choice.value, "reason": choice.reason, "alternatives": choice.alternatives},
        "reason": _reason(weights, choice, predictions, tolerance.value),
        "reloaded": None,
    }
    return {**proof, **predictions} if predictions else proof


def _on_disk(deltas: Deltas, base: Path, adapter: Path) -> Deltas:
    """The deltas, which have the names that parameters have in memory, by those of the base's tensors."""
    model = text_model.without_weights(base)
    names = {place: name for name, place in text_model.places_in_memory(model, stored_tensors(base)).items()}
    if text_model.tied(model):
        deltas = share_tied(deltas, set(names), adapter)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    deltas = {
        # PEFT says it of a whole adapter, and not where NF4 stood in for the layer.
        name: replace(delta, transposed=name in conv1d) if isinstance(delta, LoraDelta) else delta
        for name, delta in deltas.items()
    }
    return {names.get(name, name): delta for name, delta in deltas.items()}


def _refuse_unchanged(weights: WeightCheck, deltas: Deltas, adapter: Path) -> None:
    """Raise UserError where the adapter changes no weight: what would be evaluated as tuned is the base."""
    if weights["changed_weights"] and not all(map(is_nothing, deltas.values())):
        return
    raise UserError(
        f"{adapter}: the training changed nothing: none of {weights['adapted_weights']:,} adapted weights differs from "
        "the base's, so the merged model would be the base. Raise train.learning_rate or train.epochs"
    )


def _merge_into_chosen(
    settings: MergeSettings, inputs: MergeInputs, deltas: Deltas, model: Path, work: Path, context: Context
) -> Merged:
    """Write the merged weights, merged into whichever base is chosen; `work` is a folder for what is measured."""
    base = inputs.model / "model"
    # A base that came in 4 bit has no values but those that were trained on.
    came_packed = bool((read_json(inputs.model / "source.json").get("quantised") or {}).get("trained_as_it_is"))
    if settings.method != "qlora" or came_packed:
        merge_weights(base, deltas, model, context)
        return Merged(None, deltas, {})
    compute: torch.dtype = getattr(torch, precision.compute_dtype(context.device).value)
    candidates: dict[str, Deltas] = {"original": deltas}
    choice = None
    if settings.base != "original":
        try:
            candidates["dequantized"] = base_choice.on_dequantised(base, deltas, compute, context.device)
        except UserError as error:
            if settings.base == "dequantized":
                raise
            choice = Choice[str, BaseCandidate]("original", f"there is no other: {error}")
    choice = choice or _choose_base(settings, inputs, candidates, work, context)
    context.progress.say(f"merging into the {choice.value} base: {choice.reason}")
    written = work / choice.value
    if written.is_dir():
        for path in written.iterdir():
            path.rename(model / path.name)
    else:
        merge_weights(base, candidates[choice.value], model, context)
    if choice.value == "original":
        return Merged(choice, deltas, {})
    before = base_choice.on_dequantised(base, {}, compute, context.device)
    return Merged(choice, candidates["dequantized"], before)


def _choose_base(
    settings: MergeSettings, inputs: MergeInputs, candidates: dict[str, Deltas], work: Path, context: Context
) -> Choice[str, BaseCandidate]:
    if settings.base != "auto":
        return Choice(settings.base, "as set by merge.base")
    rows = base_choice.held_out(inputs.tokenize / "heldout.arrow")
    if not rows:
        return Choice("original", "there are no held-out rows to measure the other one on")
    base, adapter = inputs.model / "model", inputs.train / "adapter"
    groups = base_choice.groups_of(inputs.format / "heldout.parquet", rows)
    losses = base_choice.measure(base, adapter, candidates, rows, work, context, groups)
    return base_choice.choose_base(losses, groups and groups[: len(losses["trained"])])


def _reason(
    weights: WeightCheck,
    choice: Choice[str, BaseCandidate] | None,
    predictions: LogitComparison | None,
    tolerance: float,
) -> str:
    dequantised = choice is not None and choice.value == "dequantized"
    reason = (
        f"{weights['changed_weights']} of {weights['adapted_weights']} adapted "
        f"{'or dequantised ' if dequantised else ''}weights changed, and every other byte is the base's, headers "
        f"included (all {weights['bytes_read_back']:,} bytes read back from disk and compared)"
    )
    if weights["unchanged_weights"]:
        reason += f"; in {weights['unchanged_weights']} the adapter's change is nothing or lost in rounding"
    if predictions is None:
        return reason + "; there are no held-out rows to compare predictions on"
    tied = predictions["reloaded"]["tied"]
    same = "word for word" if not tied else f"up to token {tied['position']}, where two are as good as tied"
    return (
        f"read back from disk, the merged model predicts as base + adapter do: {predictions['kl']:.2g} nats a token "
        f"apart (allowed {tolerance:g}{_flips(predictions, tolerance)}; the base is "
        f"{predictions['base_kl']:.2g} apart), the same most likely token at "
        f"{predictions['top_token_agreement']:.2%} of {predictions['positions']:,} positions, "
        f"{predictions['loading']['reason']}; a fresh process replies to a held-out prompt as they do, {same}; {reason}"
    )


def _flips(predictions: LogitComparison, tolerance: float) -> str:
    """Why more than is allowed is right: see verification.only_routers_flip."""
    if predictions["kl"] <= tolerance:
        return ""
    losses = predictions["heldout_loss"]
    return (
        f", and more where a router has two experts nearly tied and rounding decides: the median position is "
        f"{predictions['kl_median']:.2g} apart, the held-out loss {losses['merged'] - losses['adapter']:+.2g}"
    )


def _take_full(trained: Path, base: Path, model: Path, context: Context) -> FullProof:
    """Write the base's files with each tensor that was trained in its place; what training didn't hold stays.

    Every trained tensor must be finite, and have a place of its shape in the base.
    """
    for file in shard_files(trained):
        with safe_open(trained / file, "pt") as stored:
            broken = [name for name in stored.keys() if not torch.isfinite(stored.get_tensor(name)).all()]
        if broken:
            raise UserError(f"{trained / file}: {broken[0]} holds numbers that aren't finite: the training diverged")
    deltas = trained_tensors(trained, base)
    merge_weights(base, deltas, model, context)
    weights = check_weights(base, model, deltas, context)
    if not weights["changed_weights"]:
        raise UserError(f"{trained}: the training changed nothing: raise train.learning_rate or train.epochs")
    kept = len(stored_tensors(base)) - len(deltas)
    others = f", and {kept} others, which training didn't hold, are the base's byte for byte" if kept else ""
    return {
        "checked": True,
        "method": "full",
        "reason": "all weights were trained, so there is nothing to merge: every tensor is finite and shaped as the "
        f"base's; {weights['adapted_weights']} stand under the base's names{others} (all "
        f"{weights['bytes_read_back']:,} bytes read back from disk and compared)",
    }


def _write_companions(inputs: MergeInputs, base: Path, model: Path) -> None:
    """Generation config, tokenizer with its template and licence files beside weights and config.

    A file that may be a hard link of another stage's is removed first, never written into.
    """
    kept = [path for pattern in KEPT_FILES for path in base.glob(pattern)]
    for path in [*kept, *sorted((inputs.tokenize / "tokenizer").iterdir())]:
        if path.is_dir():
            shutil.copytree(path, model / path.name)
        else:
            _replace(model / path.name, path.read_bytes())
    config = read_json(model / "config.json")
    details = read_json(inputs.tokenize / "tokenize.json")
    own = base / "generation_config.json"
    ends = [details["end_of_turn"]["id"], *(end["id"] for end in details["reply_ends"])]
    generation = generation_config(base, config, ends, _pad_id(model))
    if own.exists() and read_json(own) == generation:
        _replace(model / own.name, own.read_bytes())
    else:
        _replace(model / own.name, json.dumps(generation, indent=2, sort_keys=True).encode() + b"\n")


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _pad_id(model: Path) -> int | None:
    return AutoTokenizer.from_pretrained(model, local_files_only=True).pad_token_id


def generation_config(base: Path, config: dict[str, Any], trained: list[int], pad: int | None) -> dict[str, Any]:
    """The base's generation config, which also ends at the trained ends of turn, and pads with an id that exists."""
    path = base / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    generation["eos_token_id"] = list(dict.fromkeys([*trained, *ends]))
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    own = generation.get("pad_token_id")
    if own is None or not 0 <= own < vocabulary:
        generation["pad_token_id"] = trained[0] if pad is None else pad
    generation.pop("_from_model_config", None)
    return generation
