"""Which base an adapter that was trained on NF4 weights is merged into: the original one, or as training saw it."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from adder.core import intervals, precision
from adder.core.choice import Choice
from adder.core.safetensors_layout import DTYPES, shard_files, stored_tensors
from adder.core.stage_spec import Context
from adder.merging import candidate_weights
from adder.merging.candidate_weights import AsStored
from adder.merging.records import BaseCandidate, BaseDifference
from adder.merging.streamed_merge import Deltas, merge_weights
from adder.merging.verification import Loaded, choose_loading, load, row_losses, spread_rows
from adder.merging.weight_deltas import WeightDelta
from adder.tokenization.token_table import TokenRow
from adder.training import base_model

MEASURED_ROWS = 64
FIRST_ROWS = 16  # that a CPU reads first
FEWEST_DRAWN = 8  # rows or groups that an interval over them is trusted with before all are read
ALIKE = 5e-4  # nats a token
MEASURED_LABELS = 8192
# In the order in which proof.json has them; differences are against the first.
NAMES = {
    "trained": "adapter on NF4",
    "original": "merged into the original",
    "dequantized": "merged into the dequantised",
}
RowLosses = list[tuple[float, int]]  # of each row the loss in nats, and labelled tokens


@dataclass(frozen=True)
class DequantisedWeight:
    """A weight as training on NF4 saw it, quantised on `device` and back, and then as `then` changes it."""

    shape: tuple[int, ...]
    stored: torch.dtype  # of the weight in its file
    compute: torch.dtype  # that training computed in
    transposed: bool  # stored (in, out), and quantised the other way round
    device: str
    then: WeightDelta | None = None

    @property
    def rank(self) -> int:
        """That of the change."""
        return self.then.rank if self.then else 0

    @property
    def by_rows(self) -> bool:
        """The scales of the blocks are quantised together."""
        return False

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The weight in fp32. `weight`: all of it, fp32."""
        values = dequantised(weight.T if self.transposed else weight, self.compute, self.device)
        values = (values.T if self.transposed else values).to(self.stored).to(weight.device, torch.float32)
        return self.then.apply(values, first) if self.then else values


def dequantised(weight: torch.Tensor, compute: torch.dtype, device: str) -> torch.Tensor:
    """The values, in dtype `compute`, that base_model's NF4 layers compute with in place of `weight` (out, in)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    own = weight.to(device, compute).contiguous()
    return dequantize_4bit(*quantize_4bit(own, blocksize=64, quant_type="nf4", compress_statistics=True))


def on_dequantised(base: Path, deltas: Deltas, compute: torch.dtype, device: str) -> dict[str, WeightDelta]:
    """The same deltas after NF4 and back, of every weight that training on NF4 quantises."""
    stored = stored_tensors(base)
    both = dict(deltas)
    for name, transposed in base_model.dequantisable_weights(base).items():
        tensor = stored[name]
        dtype = DTYPES[tensor.dtype]
        both[name] = DequantisedWeight(tensor.shape, dtype, compute, transposed, device, deltas.get(name))
    return both


def held_out(tokens: Path) -> list[TokenRow]:
    """The held-out rows to measure on: up to MEASURED_ROWS, evenly spread."""
    return spread_rows(tokens, MEASURED_ROWS, MEASURED_LABELS)


def groups_of(conversations: Path, rows: Sequence[TokenRow]) -> list[str] | None:
    """The group of each of `rows`, by data.heldout.group_by; None where there are none."""
    if "group" not in pq.read_schema(conversations).names:
        return None
    table = pq.read_table(conversations, columns=["id", "group"])
    known = dict(zip(table["id"].to_pylist(), table["group"].to_pylist(), strict=True))
    return [known[row["id"]] for row in rows]


def measure(
    base: Path,
    adapter: Path,
    candidates: Mapping[str, Deltas],
    rows: Sequence[TokenRow],
    work: Path,
    context: Context,
    groups: Sequence[str] | None = None,
) -> dict[str, RowLosses]:
    """Losses of the first rows of the model as it was trained and of each candidate: of as many as tell them apart.

    `candidates`: deltas of the base by a name of NAMES. All compute in the dtype that training computes in here. The
    base is loaded once, and each candidate's weights take the place of those before. A model that has no room in
    memory, or that holds what changes in another form than its files, is measured by measure_files, on all rows.
    """
    device, progress = context.device, context.progress
    compute: torch.dtype = getattr(torch, precision.compute_dtype(device).value)
    quantised = base_model.quantised_weights(base)
    loading = choose_loading(base, compute, device).value
    if loading == "whole":
        progress.line("which base: loading it")
        model = load(base, compute, loading, device).model
        assert isinstance(model, PreTrainedModel)
        if candidate_weights.can_hold(
            model, base, {*quantised, *(name for own in candidates.values() for name in own)}
        ):
            return _measure_in(model, base, adapter, quantised, candidates, rows, groups, context)
        del model
    return measure_files(base, adapter, candidates, rows, work, context)


def _measure_in(
    model: PreTrainedModel,
    base: Path,
    adapter: Path,
    quantised: Mapping[str, bool],
    candidates: Mapping[str, Deltas],
    rows: Sequence[TokenRow],
    groups: Sequence[str] | None,
    context: Context,
) -> dict[str, RowLosses]:
    """As measure, in a model that is loaded. On a CPU some rows first, since the rest is often not needed."""
    adapted = {name: delta.shape for own in candidates.values() for name, delta in own.items()}
    losses: dict[str, RowLosses] = {name: [] for name in ("trained", *candidates)}
    steps = [len(rows)] if context.device == "cuda" else [min(FIRST_ROWS, len(rows)), len(rows)]
    done = 0
    for stop in dict.fromkeys(steps):
        own = list(rows[done:stop])
        for name in losses:
            context.progress.line(f"which base: {NAMES[name]}, {stop} rows")
            if name == "trained":
                reset = {other: AsStored(shape) for other, shape in adapted.items() if other not in quantised}
                candidate_weights.hold(model, base, reset, context)
                _hold_dequantised(model, base, quantised, context)
                losses[name] += _losses_with(model, adapter, own, context)
                continue
            reset = {other: AsStored(shape) for other, shape in adapted.items()}
            candidate_weights.hold(model, base, {**reset, **candidates[name]}, context)
            losses[name] += candidate_weights.losses(model, own)
        done = stop
        if stop < len(rows) and told_apart(losses, None if groups is None else groups[:stop]):
            break
    return losses


def _hold_dequantised(model: PreTrainedModel, base: Path, quantised: Mapping[str, bool], context: Context) -> None:
    """Give the model the values that NF4 layers compute with, in its own dtype."""
    parameters = candidate_weights.by_stored_name(model, base)
    stored = stored_tensors(base)
    for file in shard_files(base):
        with safe_open(base / file, "pt", device=context.device) as tensors:
            for name in tensors.keys():
                if name in quantised and name in stored:
                    weight = tensors.get_tensor(name)
                    values = dequantised(weight.T if quantised[name] else weight, model.dtype, context.device)
                    parameters[name].data.copy_(values.T if quantised[name] else values)


def _losses_with(
    model: PreTrainedModel, adapter: Path, rows: list[TokenRow], context: Context
) -> list[tuple[float, int]]:
    """Losses with the adapter beside the weights, as in training; afterwards the model is without it."""
    dtype = model.dtype
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    try:
        with torch.autocast(context.device, dtype, enabled=dtype != torch.float32):
            return candidate_weights.losses(base_model.bare_model(adapted), rows)
    finally:
        adapted.unload()


def told_apart(losses: Mapping[str, RowLosses], groups: Sequence[str] | None) -> bool:
    """Whether further rows would tell nothing new of the two merged models.

    Either the interval of their difference leaves out 0, or all of it is so near to 0 that no score would show it.
    """
    tokens = [count for _, count in losses["trained"]]
    interval = _difference(losses["original"], losses["dequantized"], tokens, groups)["ci95"]
    if interval is None:
        return False
    low, high = interval
    drawn = len(losses["trained"] if groups is None else set(groups))
    return drawn >= FEWEST_DRAWN and (not low <= 0 <= high or max(abs(low), abs(high)) < ALIKE)


def measure_files(
    base: Path,
    adapter: Path,
    candidates: Mapping[str, Deltas],
    rows: Sequence[TokenRow],
    work: Path,
    context: Context,
) -> dict[str, RowLosses]:
    """As measure, with each candidate's merged weights in `work`/name, where they stay; one is loaded at a time."""
    device, progress = context.device, context.progress
    dtype = precision.compute_dtype(device).value
    progress.line(f"which base: adapter on NF4, {len(rows)} rows")
    model, _ = base_model.load(base, "qlora", dtype, device, packs=False)
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        losses = {"trained": row_losses(Loaded(PeftModel.from_pretrained(model, adapter).eval(), False), rows)}
    del model
    for name, deltas in candidates.items():
        folder = work / name
        folder.mkdir()
        merge_weights(base, deltas, folder, context)
        shutil.copyfile(base / "config.json", folder / "config.json")
        progress.line(f"which base: {NAMES[name]}, {len(rows)} rows")
        loading = choose_loading(folder, getattr(torch, dtype), device).value
        losses[name] = row_losses(load(folder, getattr(torch, dtype), loading, device), rows)
    return losses


def choose_base(losses: Mapping[str, RowLosses], groups: Sequence[str] | None = None) -> Choice[str, BaseCandidate]:
    """Of the two merged models the one with the lower held-out loss; the original where that can't be told apart.

    `losses`: by the names of NAMES, for the same rows, which may come in `groups`. A difference counts when its 95 %
    interval, paired over rows or groups, leaves out 0; from a single one nothing can be told.
    """
    tokens = [count for _, count in losses["trained"]]
    table: list[BaseCandidate] = []
    for name, label in NAMES.items():
        loss = sum(nats for nats, _ in losses[name]) / sum(tokens)
        difference = None if name == "trained" else _difference(losses["trained"], losses[name], tokens, groups)
        table.append(
            {"base": label, "loss": loss, "rows": len(tokens), "tokens": sum(tokens), "difference": difference}
        )
    trained, original, dequantised = (row["loss"] for row in table)
    gap = _difference(losses["original"], losses["dequantized"], tokens, groups)
    low, high = gap["ci95"] or (-math.inf, math.inf)
    drawn = len(tokens if groups is None else set(groups))
    tie = low <= 0 <= high
    value = "dequantized" if high < 0 and not tie else "original"
    verdict = "a tie within noise, which goes to the original" if tie else "the lower is taken"
    interval = (
        f"95 % interval {low:+z.4f} to {high:+z.4f}" if gap["ci95"] else "no interval: nothing to compare it with"
    )
    rows = f"{len(tokens)} rows" + ("" if groups is None else f" in {drawn} {'group' if drawn == 1 else 'groups'}")
    reason = (
        f"held-out loss on {rows}: {trained:.4f} nats a token for the adapter on NF4, as it was trained, "
        f"{original:.4f} merged into the original weights and {dequantised:.4f} into the dequantised ones; the latter "
        f"two differ by {gap['value']:+z.4f} ({interval}), {verdict}"
    )
    return Choice(value, reason, table)


def _difference(
    first: RowLosses, second: RowLosses, tokens: Sequence[int], groups: Sequence[str] | None
) -> BaseDifference:
    gaps = [b - a for (a, _), (b, _) in zip(first, second, strict=True)]
    found = intervals.ratio(gaps, tokens, groups)
    return {"value": found["value"], "ci95": found["ci95"] if math.isfinite(found["stderr"]) else None}
