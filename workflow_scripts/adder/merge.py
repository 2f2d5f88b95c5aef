"""Merge the adapter into the base's 16-bit weights, and prove that the result is base + adapter."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adder import hardware
from adder.changes import Change, Whole, read_adapter, share_tied
from adder.choice import Choice
from adder.errors import UserError
from adder.files import link_or_copy, read_json, write_json
from adder.forward import labelled_logits
from adder.model_card import write_model_card
from adder.progress import Progress
from adder.tokens import TokenTable

IGNORED = -100
PROOF_ROWS = 16
PROOF_POSITIONS = 1024  # label positions whose logits are compared: 200 MB of them for a vocabulary of 49,152
TOLERANCE = 1e-3  # nats a token; see choose_tolerance
INDEX = "model.safetensors.index.json"
# Beside weights, config and tokenizer, what belongs to a model and must travel with it.
KEPT_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Write the merged model directory `model/` and its `proof.json` into `out`.

    `inputs`: train (`adapter/`, or `model/` of a full training, which is taken as it is), model (the base), tokenize.
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
    return {name: proof[name] for name in ("kl", "tolerance", "adapted_weights", "changed_weights") if name in proof}


def _merge(settings: dict, inputs: dict[str, Path], base: Path, model: Path, progress: Progress) -> dict:
    adapter = inputs["train"] / "adapter"
    changes = read_adapter(adapter)
    if AutoConfig.from_pretrained(base, local_files_only=True).get_text_config().tie_word_embeddings:
        changes = share_tied(changes, set(_shapes(base)), adapter)
    merge_weights(base, changes, model, progress)
    weights = check_weights(base, model, changes)
    shutil.copyfile(base / "config.json", model / "config.json")
    rows = proof_rows(inputs["tokenize"] / "heldout.arrow")
    tolerance = choose_tolerance(settings["tolerance"])
    logits = compare_logits(base, adapter, model, rows, progress) if rows else {}
    proof = {**weights, **logits, "tolerance": tolerance.value, "tolerance_reason": tolerance.reason}
    proof |= {"checked": bool(rows), "rows": len(rows)}
    if rows and not proof["kl"] <= tolerance.value:  # a KL that isn't a number fails as well
        raise UserError(
            f"the merged model isn't base + adapter: their predictions on {len(rows)} held-out rows differ by "
            f"{proof['kl']:.2g} nats a token (mean KL divergence), allowed are {tolerance.value:g} (merge.tolerance)"
        )
    return proof | {"reason": _reason(proof)}


def _reason(proof: dict) -> str:
    reason = (
        f"{proof['changed_weights']} of {proof['adapted_weights']} adapted weights changed, and every other tensor is "
        "the base's, byte for byte"
    )
    if proof["unchanged_weights"]:
        reason += f"; in {proof['unchanged_weights']} the adapter's change is nothing or lost in rounding"
    if not proof["checked"]:
        return reason + "; there are no held-out rows to compare predictions on"
    return (
        f"read back from disk, the merged model predicts as base + adapter do: {proof['kl']:.1e} nats a token apart "
        f"(allowed {proof['tolerance']:g}; the base is {proof['base_kl']:.1e} apart), the same most likely token at "
        f"{proof['top_token_agreement']:.2%} of {proof['positions']:,} positions; {reason}"
    )


def shard_files(folder: Path) -> list[str]:
    """Names of a model directory's safetensors files, sorted. Raises UserError if there are none."""
    if (folder / INDEX).exists():
        return sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    raise UserError(f"{folder}: holds no model.safetensors and no {INDEX}")


def merge_weights(base: Path, changes: dict[str, Change], target: Path, progress: Progress) -> None:
    """Write the base's files into `target` as the adapter changes them, one file in memory at a time.

    A changed weight is computed in fp32 and rounded once to the base's dtype (see round_without_bias). Every other
    tensor, the division into files and their metadata stay as they are. Raises UserError when the adapter doesn't fit
    the base.
    """
    files = shard_files(base)
    left = set(changes)
    for number, file in enumerate(files, 1):
        progress.line(f"merging file {number} of {len(files)}")
        with safe_open(base / file, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        for name in left & tensors.keys():
            tensors[name] = merged(name, tensors[name], changes[name])
        left -= tensors.keys()
        save_file(tensors, target / file, metadata)
        (target / file).chmod(0o644)  # safetensors lets nobody else read what it writes
    if left:
        raise UserError(
            f"the adapter changes {sorted(left)[0]} (and {len(left) - 1} more), which the base in {base} doesn't have "
            "as a tensor of its own: the adapter belongs to another model, or to a layer that shares its weight"
        )
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, target / INDEX)


def merged(name: str, weight: torch.Tensor, change: Change) -> torch.Tensor:
    """The weight as the adapter changes it, in the weight's dtype. Raises UserError when shape or dtype don't fit."""
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"{name} of the base is {weight.dtype}: merging needs 16-bit or 32-bit weights")
    try:
        exact = change.apply(weight.float())
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return round_without_bias(exact, weight.dtype, seed="whole" if isinstance(change, Whole) else name)


def round_without_bias(exact: torch.Tensor, dtype: torch.dtype, seed: str) -> torch.Tensor:
    """Round fp32 to one of the two nearest values of `dtype`, up or down at random so that the mean is kept.

    The base's weights are exact in `dtype`, and much of what an adapter adds is less than half a step: rounding to
    nearest would drop all of that, in every weight. Measured on a briefly trained adapter of a bf16 model of 135 M
    parameters: 0.0055 nats a token from base + adapter and a held-out loss of 1.11 for 1.04, against 0.0001 nats and
    the same loss this way. The random numbers follow from `seed`. Source: Gupta et al. 2015, arXiv:1502.02551.
    """
    nearest = exact.to(dtype)
    if dtype == exact.dtype:
        return nearest
    error = exact - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    chance = error / (other.float() - nearest.float())
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest()))
    return torch.where(torch.rand(exact.shape, generator=generator) < chance, other, nearest)


def check_weights(base: Path, model: Path, changes: dict[str, Change]) -> dict:
    """Compare the merged files on disk with the base's; return {adapted_weights, changed_weights, unchanged_weights}.

    Raises UserError unless every adapted weight is the rounded sum and finite, and every other tensor, bit for bit,
    the base's. An adapted weight may be unchanged only if all of its change is lost in rounding; its name is reported
    in `unchanged`.
    """
    if shard_files(model) != shard_files(base):
        raise UserError(f"{model}: the merged model's files aren't those of its base: {shard_files(model)}")
    unchanged, share = [], {}
    for file in shard_files(base):
        with safe_open(base / file, "pt") as before, safe_open(model / file, "pt") as after:
            if set(before.keys()) != set(after.keys()):
                raise UserError(f"{model / file}: holds other tensors than its base")
            for name in before.keys():
                old, new = before.get_tensor(name), after.get_tensor(name)
                if name in changes and not torch.isfinite(new).all():
                    raise UserError(f"{model / file}: {name} holds numbers that aren't finite: the adapter is broken")
                expected = merged(name, old, changes[name]) if name in changes else old
                if not _same_bits(expected, new):
                    what = "base + adapter" if name in changes else "its base's, though nothing adapts it"
                    raise UserError(f"{model / file}: {name} isn't {what}")
                if name in changes:
                    share[name] = float((old != new).float().mean())
                    unchanged += [name] if _same_bits(old, new) else []
    return {
        "adapted_weights": len(changes),
        "changed_weights": len(changes) - len(unchanged),
        "unchanged_weights": len(unchanged),
        "unchanged": unchanged,
        "changed_share": sum(share.values()) / len(share),
    }


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def proof_rows(heldout: Path) -> list[dict]:
    """Evenly spread held-out rows ({input_ids, labels}), a few dozen, with at most PROOF_POSITIONS labels in all."""
    table = TokenTable(heldout)
    rows, positions = [], 0
    for number in range(0, len(table), max(1, len(table) // PROOF_ROWS))[:PROOF_ROWS]:
        row = table.row(number)
        # A long row is cut behind its first labels: causal logits don't depend on what follows.
        labelled = [index for index, label in enumerate(row["labels"]) if index and label != IGNORED]
        labelled = labelled[: PROOF_POSITIONS - positions]
        if labelled:
            rows.append({name: row[name][: labelled[-1] + 1] for name in ("input_ids", "labels")})
            positions += len(labelled)
    return rows


def compare_logits(base: Path, adapter: Path, model: Path, rows: list[dict], progress: Progress) -> dict:
    """Compare the merged model, read from disk, with PEFT's unmerged adapter on the same base, all in fp32.

    Returns {positions, max_difference, mean_difference, top_token_agreement, kl, base_kl, heldout_loss: {merged,
    adapter}}: logits' absolute difference, and the mean KL divergence from base + adapter in nats a labelled token, of
    the merged model and, to compare with, of the bare base. The models are loaded one after the other. Raises UserError
    for logits that aren't finite.
    """
    device = _proof_device(base)
    progress.line(f"proof: base + adapter on {len(rows)} rows")
    unmerged = PeftModel.from_pretrained(_load(base, device), adapter).eval()
    expected = _logits(unmerged, rows)
    with unmerged.disable_adapter():
        base_logits = _logits(unmerged, rows)
    del unmerged
    progress.line(f"proof: merged model on {len(rows)} rows")
    actual = _logits(_load(model, device), rows)
    sums = dict.fromkeys(("difference", "agree", "kl", "base_kl", "merged", "adapter"), 0.0)
    largest, positions, vocabulary = 0.0, 0, expected[0][0].shape[1]
    for (before, target), (after, _), (plain, _) in zip(expected, actual, base_logits, strict=True):
        if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise UserError("the merged model, or base + adapter, computes logits that aren't finite")
        gap = (before - after).abs()
        log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
        wanted = target[:, None]
        largest = max(largest, float(gap.max()))
        positions += len(target)
        sums["difference"] += float(gap.double().sum()) / vocabulary
        sums["agree"] += float((before.argmax(-1) == after.argmax(-1)).sum())
        sums["kl"] += float((log_before.exp() * (log_before - log_after)).double().sum())
        sums["base_kl"] += float((log_before.exp() * (log_before - plain.log_softmax(-1))).double().sum())
        sums["merged"] -= float(log_after.gather(1, wanted).double().sum())
        sums["adapter"] -= float(log_before.gather(1, wanted).double().sum())
    mean = {name: value / positions for name, value in sums.items()}
    return {
        "positions": positions,
        "max_difference": largest,
        "mean_difference": mean["difference"],
        "top_token_agreement": mean["agree"],
        "kl": max(0.0, mean["kl"]),  # of two equal distributions, rounding may leave it a hair below
        "base_kl": max(0.0, mean["base_kl"]),
        "heldout_loss": {"merged": mean["merged"], "adapter": mean["adapter"]},
    }


@torch.inference_mode()
def _logits(model: torch.nn.Module, rows: list[dict]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = (labelled_logits(model, row["input_ids"], row["labels"]) for row in rows)
    return [(logits.cpu(), target.cpu()) for logits, target in pairs]


def _load(folder: Path, device: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device).eval()


def _proof_device(base: Path) -> str:
    """The GPU if the weights fit there in fp32 (twice the 16-bit files, and some room), else the CPU."""
    if hardware.device() == "cpu":
        return "cpu"
    needed = 2.2 * sum((base / file).stat().st_size for file in shard_files(base))
    return "cuda" if needed < torch.cuda.mem_get_info()[0] else "cpu"


def choose_tolerance(wanted: str | float) -> Choice:
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


def _take_full(trained: Path, base: Path, model: Path) -> dict:
    """Link the fully trained model's files; every tensor must be finite and shaped as the base's."""
    shapes = _shapes(base)
    for path in sorted(trained.iterdir()):
        link_or_copy(path, model / path.name)
    own = _shapes(model)
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


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for file in shard_files(folder):
        with safe_open(folder / file, "pt") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}
    return shapes


def _write_companions(inputs: dict[str, Path], base: Path, model: Path) -> None:
    """Config, generation config, tokenizer with its template, licence files and model card beside the weights.

    A file that may be a hard link of another stage's is removed first, never written into.
    """
    kept = [path for pattern in KEPT_FILES for path in base.glob(pattern)]
    for path in [*kept, *sorted((inputs["tokenize"] / "tokenizer").iterdir())]:
        _replace(model / path.name, path.read_bytes())
    config = read_json(model / "config.json")
    details = read_json(inputs["tokenize"] / "tokenize.json")
    generation = generation_config(base, config, details["end_of_turn"]["id"], _pad_id(model))
    _replace(model / "generation_config.json", json.dumps(generation, indent=2, sort_keys=True).encode() + b"\n")
    (model / "README.md").unlink(missing_ok=True)
    write_model_card(model / "README.md", inputs)


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
