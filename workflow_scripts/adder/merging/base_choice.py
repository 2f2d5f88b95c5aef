"""Which base an adapter that was trained on NF4 weights is merged into: the original one, or as training saw it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from adder.core import hardware, intervals, precision
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.core.safetensors_layout import DTYPES, stored_tensors
from adder.merging.streamed_merge import merge_weights
from adder.merging.verification import Loaded, choose_loading, load, row_losses, spread_rows
from adder.merging.weight_deltas import Change
from adder.training import base_model

MEASURED_ROWS = 64
MEASURED_LABELS = 8192
# In the order in which proof.json has them; differences are against the first.
NAMES = {
    "trained": "adapter on NF4",
    "original": "merged into the original",
    "dequantized": "merged into the dequantised",
}


@dataclass(frozen=True)
class Dequantised:
    """A weight as training on NF4 saw it, quantised and back, and then as `then` changes it."""

    shape: tuple[int, ...]
    stored: torch.dtype  # of the weight in its file
    compute: torch.dtype  # that training computed in
    transposed: bool  # stored (in, out), and quantised the other way round
    then: Change | None = None
    by_rows = False  # the scales of the blocks are quantised together

    @property
    def rank(self) -> int:
        """What the sum costs: products for each number."""
        return self.then.rank if self.then else 0

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The weight in fp32. `weight`: all of it, fp32."""
        values = dequantised(weight.T if self.transposed else weight, self.compute)
        values = (values.T if self.transposed else values).to(self.stored).to(weight.device, torch.float32)
        return self.then.apply(values, first) if self.then else values


def dequantised(weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """The values, in dtype `compute`, that base_model's NF4 layers compute with in place of `weight` (out, in)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    own = weight.to(hardware.device(), compute).contiguous()
    return dequantize_4bit(*quantize_4bit(own, blocksize=64, quant_type="nf4", compress_statistics=True))


def on_dequantised(base: Path, changes: dict[str, Change], compute: torch.dtype) -> dict[str, Change]:
    """The same changes after NF4 and back, of every weight that training on NF4 quantises."""
    stored = stored_tensors(base)
    both = dict(changes)
    for name, transposed in quantised_weights(base).items():
        if name not in stored or stored[name].dtype not in DTYPES:
            raise UserError(f"merge.base: {base} has no {name} in 16 or 32 bits of its own, so it can't be dequantised")
        tensor = stored[name]
        both[name] = Dequantised(tensor.shape, DTYPES[tensor.dtype], compute, transposed, changes.get(name))
    return both


def quantised_weights(base: Path) -> dict[str, bool]:
    """Names of the weights that transformers quantises in this model, and whether each is stored (in, out)."""
    import bitsandbytes

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    quantizer.preprocess_model(model, device_map=None)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    return {f"{name}.weight": issubclass(layer.source_cls, Conv1D) for name, layer in layers.items()}


def held_out(tokens: Path) -> list[dict]:
    """The held-out rows to measure on: up to MEASURED_ROWS, evenly spread."""
    return spread_rows(tokens, MEASURED_ROWS, MEASURED_LABELS)


def groups_of(conversations: Path, rows: list[dict]) -> list[str] | None:
    """The group of each of `rows`, by data.heldout.group_by; None where there are none."""
    if "group" not in pq.read_schema(conversations).names:
        return None
    table = pq.read_table(conversations, columns=["id", "group"])
    known = dict(zip(table["id"].to_pylist(), table["group"].to_pylist(), strict=True))
    return [known[row["id"]] for row in rows]


def measure(
    base: Path,
    adapter: Path,
    candidates: dict[str, dict[str, Change]],
    rows: list[dict],
    work: Path,
    progress: Progress,
) -> dict[str, list[tuple[float, int]]]:
    """Losses of each row, (nats, labelled tokens), of the model as it was trained and of each candidate.

    `candidates`: changes of the base by a name of NAMES; the merged weights stay in `work`/name. All compute in the
    dtype that training computes in here, and only one is loaded at a time.
    """
    device = hardware.device()
    dtype = precision.compute_dtype(device).value
    progress.line(f"which base: adapter on NF4, {len(rows)} rows")
    model, _ = base_model.load(base, "qlora", dtype, device)
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        losses = {"trained": row_losses(Loaded(PeftModel.from_pretrained(model, adapter).eval(), False), rows)}
    del model
    for name, changes in candidates.items():
        folder = work / name
        folder.mkdir()
        merge_weights(base, changes, folder, progress)
        shutil.copyfile(base / "config.json", folder / "config.json")
        progress.line(f"which base: {NAMES[name]}, {len(rows)} rows")
        loading = choose_loading(folder, getattr(torch, dtype)).value
        losses[name] = row_losses(load(folder, getattr(torch, dtype), loading), rows)
    return losses


def choose(losses: dict[str, list[tuple[float, int]]], groups: list[str] | None = None) -> Choice:
    """Of the two merged models the one with the lower held-out loss; the original where that can't be told apart.

    `losses`: by the names of NAMES, for the same rows, which may come in `groups`. A difference counts when its 95 %
    interval, by a paired bootstrap over rows or groups, leaves out 0; from a single one nothing can be told.
    Alternatives: {base, loss (nats a token), rows, tokens, difference (from the first)}.
    """
    tokens = [count for _, count in losses["trained"]]
    table = []
    for name, label in NAMES.items():
        loss = sum(nats for nats, _ in losses[name]) / sum(tokens)
        difference = None if name == "trained" else _difference(losses["trained"], losses[name], tokens, groups)
        table.append(
            {"base": label, "loss": loss, "rows": len(tokens), "tokens": sum(tokens), "difference": difference}
        )
    trained, original, dequantised = (row["loss"] for row in table)
    gap = _difference(losses["original"], losses["dequantized"], tokens, groups)
    low, high = gap["ci95"]
    drawn = len(tokens if groups is None else set(groups))
    tie = drawn < 2 or low <= 0 <= high
    value = "dequantized" if high < 0 and not tie else "original"
    verdict = "a tie within noise, which goes to the original" if tie else "the lower is taken"
    rows = f"{len(tokens)} rows" + ("" if groups is None else f" in {drawn} {'group' if drawn == 1 else 'groups'}")
    reason = (
        f"held-out loss on {rows}: {trained:.4f} nats a token for the adapter on NF4, as it was trained, "
        f"{original:.4f} merged into the original weights and {dequantised:.4f} into the dequantised ones; the latter "
        f"two differ by {gap['value']:+z.4f} (95 % interval {low:+z.4f} to {high:+z.4f}), {verdict}"
    )
    return Choice(value, reason, table)


def _difference(
    first: list[tuple[float, int]], second: list[tuple[float, int]], tokens: list[int], groups: list[str] | None
) -> dict:
    gaps = [b - a for (a, _), (b, _) in zip(first, second, strict=True)]
    found = intervals.ratio(gaps, tokens, groups)
    return {"value": found["value"], "ci95": found["ci95"]}
