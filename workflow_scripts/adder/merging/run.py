"""Merge the adapter into the base's weights, and prove that the result is base + adapter."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from adder.core import hardware, precision
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import link_or_copy, read_json, write_json
from adder.core.progress import Progress
from adder.core.safetensors_layout import shard_files, stored_tensors
from adder.merging import base_choice
from adder.merging.streamed_merge import check_weights, merge_weights
from adder.merging.verification import PROOF_POSITIONS, PROOF_ROWS, choose_tolerance, compare, spread_rows
from adder.merging.weight_deltas import Change, read_adapter, share_tied

# Beside weights, config and tokenizer, what belongs to a model and must travel with it.
KEPT_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write the merged model directory `model/` and its `proof.json` into `out`.

    `inputs`: train (`adapter/`, or `model/` of a full training, which is taken as it is), model (the base), tokenize,
    format (the groups of the held-out rows).
    Raises UserError, leaving no model, when the proof doesn't hold or the adapter is of a kind that can't be merged.
    """
    hardware.use_threads()
    base, model = inputs["model"] / "model", out / "model"
    model.mkdir()
    try:
        if (inputs["train"] / "adapter").is_dir():
            proof = _merge(settings, inputs, base, model, progress)
        else:
            proof = _take_full(inputs["train"] / "model", base, model)
            _write_companions(inputs, base, model)
    except UserError:
        shutil.rmtree(model)
        raise
    write_json(out / "proof.json", proof)
    progress.say(proof["reason"])
    summary = {name: proof[name] for name in ("kl", "tolerance", "adapted_weights", "changed_weights") if name in proof}
    return summary | ({"base": proof["base"]["value"]} if proof.get("base") else {})


def _merge(settings: dict, inputs: dict[str, Path], base: Path, model: Path, progress: Progress) -> dict:
    adapter, heldout = inputs["train"] / "adapter", inputs["tokenize"] / "heldout.arrow"
    changes = read_adapter(adapter)
    if AutoConfig.from_pretrained(base, local_files_only=True).get_text_config().tie_word_embeddings:
        changes = share_tied(changes, set(stored_tensors(base)), adapter)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        work = Path(folder)
        choice, changes, reference = _merge_into_chosen(settings, inputs, base, changes, model, work, progress)
        weights = check_weights(base, model, changes, progress)
        shutil.copyfile(base / "config.json", model / "config.json")
        _write_companions(inputs, base, model)
        rows = spread_rows(heldout, PROOF_ROWS, PROOF_POSITIONS)
        tolerance = choose_tolerance(settings["tolerance"])
        logits = compare(reference, adapter, model, rows, tolerance.value, progress) if rows else {"reloaded": None}
    proof = {**weights, **logits, "tolerance": tolerance.value, "tolerance_reason": tolerance.reason}
    proof |= {"checked": bool(rows), "rows": len(rows), "base": choice and choice.to_dict()}
    return proof | {"reason": _reason(proof)}


def _merge_into_chosen(
    settings: dict,
    inputs: dict[str, Path],
    base: Path,
    changes: dict[str, Change],
    model: Path,
    work: Path,
    progress: Progress,
) -> tuple[Choice | None, dict[str, Change], Path]:
    """Write the merged weights; return which base they were merged into (None where there is no choice), all that then
    changes in the original base's files, and the directory of the base that was merged into."""
    wanted = settings["base"]
    if settings["method"] != "qlora":
        merge_weights(base, changes, model, progress)
        return None, changes, base
    rows = base_choice.held_out(inputs["tokenize"] / "heldout.arrow")
    compute = precision.compute_dtype(hardware.device()).value
    candidates = {"original": changes}
    if wanted != "original":
        candidates["dequantized"] = base_choice.on_dequantised(base, changes, getattr(torch, compute))
    if wanted != "auto":
        choice = Choice(wanted, "as set by merge.base")
    elif not rows:
        choice = Choice("original", "there are no held-out rows to measure the other one on")
    else:
        losses = base_choice.measure(base, inputs["train"] / "adapter", candidates, rows, work, progress)
        choice = base_choice.choose(losses, base_choice.groups_of(inputs["format"] / "heldout.parquet", rows))
    progress.say(f"merging into the {choice.value} base: {choice.reason}")
    written = work / choice.value
    if written.is_dir():
        for path in written.iterdir():
            path.rename(model / path.name)
    else:
        merge_weights(base, candidates[choice.value], model, progress)
    if choice.value == "original":
        return choice, changes, base
    reference = work / "base"
    reference.mkdir()
    merge_weights(base, base_choice.on_dequantised(base, {}, getattr(torch, compute)), reference, progress)
    shutil.copyfile(base / "config.json", reference / "config.json")
    return choice, candidates["dequantized"], reference


def _reason(proof: dict) -> str:
    dequantised = proof["base"] and proof["base"]["value"] == "dequantized"
    reason = (
        f"{proof['changed_weights']} of {proof['adapted_weights']} adapted {'or dequantised ' if dequantised else ''}"
        "weights changed, and every other byte is the base's, headers included (all "
        f"{proof['bytes_read_back']:,} bytes read back from disk and compared)"
    )
    if proof["unchanged_weights"]:
        reason += f"; in {proof['unchanged_weights']} the adapter's change is nothing or lost in rounding"
    if not proof["checked"]:
        return reason + "; there are no held-out rows to compare predictions on"
    tied = proof["reloaded"]["tied"]
    same = "word for word" if not tied else f"up to token {tied['position']}, where two are as good as tied"
    return (
        f"read back from disk, the merged model predicts as base + adapter do: {proof['kl']:.2g} nats a token apart "
        f"(allowed {proof['tolerance']:g}; the base is {proof['base_kl']:.2g} apart), the same most likely token at "
        f"{proof['top_token_agreement']:.2%} of {proof['positions']:,} positions, {proof['loading']['reason']}; a "
        f"fresh process replies to a held-out prompt as they do, {same}; {reason}"
    )


def _take_full(trained: Path, base: Path, model: Path) -> dict:
    """Link the fully trained model's files; every tensor must be finite and shaped as the base's."""
    shapes = {name: list(tensor.shape) for name, tensor in stored_tensors(base).items()}
    for path in sorted(trained.iterdir()):
        link_or_copy(path, model / path.name)
    own = {name: list(tensor.shape) for name, tensor in stored_tensors(model).items()}
    # Only names that both have: a base may store a tied LM head a second time.
    unlike = sorted(name for name in own.keys() & shapes.keys() if own[name] != shapes[name])
    if unlike:
        name = unlike[0]
        raise UserError(f"{trained}: {name} is {own[name]} in the trained model and {shapes[name]} in its base")
    for file in shard_files(model):
        with safe_open(model / file, "pt") as stored:
            broken = [name for name in stored.keys() if not torch.isfinite(stored.get_tensor(name)).all()]
        if broken:
            raise UserError(f"{trained / file}: {broken[0]} holds numbers that aren't finite: the training diverged")
    return {
        "checked": True,
        "method": "full",
        "reason": "all weights were trained, so there is nothing to merge: every tensor is finite and shaped as the "
        "base's",
    }


def _write_companions(inputs: dict[str, Path], base: Path, model: Path) -> None:
    """Generation config, tokenizer with its template and licence files beside weights and config.

    A file that may be a hard link of another stage's is removed first, never written into.
    """
    kept = [path for pattern in KEPT_FILES for path in base.glob(pattern)]
    for path in [*kept, *sorted((inputs["tokenize"] / "tokenizer").iterdir())]:
        _replace(model / path.name, path.read_bytes())
    config = read_json(model / "config.json")
    details = read_json(inputs["tokenize"] / "tokenize.json")
    generation = generation_config(base, config, details["end_of_turn"]["id"], _pad_id(model))
    _replace(model / "generation_config.json", json.dumps(generation, indent=2, sort_keys=True).encode() + b"\n")


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _pad_id(model: Path) -> int | None:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True).pad_token_id


def generation_config(base: Path, config: dict, end_of_turn: int, pad: int | None) -> dict:
    """The base's generation config, which also ends at the trained end of turn, and pads with an id that exists."""
    path = base / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    generation["eos_token_id"] = [end_of_turn, *(end for end in ends if end != end_of_turn)]
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    own = generation.get("pad_token_id")
    if own is None or not 0 <= own < vocabulary:
        generation["pad_token_id"] = end_of_turn if pad is None else pad
    generation.pop("_from_model_config", None)
    return generation
