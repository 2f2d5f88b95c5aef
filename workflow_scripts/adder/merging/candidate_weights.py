"""Weights that a merge would write, in a loaded model instead of a file: candidates cost no room on the disk."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adder.core import text_model
from adder.core.progress import Progress
from adder.core.safetensors_layout import DTYPES, layout, shard_files, stored_tensors
from adder.core.stage_spec import Context
from adder.evaluation import heldout_loss
from adder.merging.streamed_merge import (
    Bytes,
    ChangedBlock,
    Deltas,
    blocks,
    in_threads,
    opened,
    read_bytes,
    sums_device,
    threads_for,
)
from adder.tokenization.token_table import TokenRow


@dataclass(frozen=True)
class AsStored:
    """No change: a weight that another candidate has changed becomes the base's again."""

    shape: tuple[int, ...]
    rank: int = 0
    by_rows: bool = True

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The weight as it is."""
        return weight


@dataclass
class LabelledRow:
    """A row as heldout_loss reads it."""

    input_ids: list[int]
    labels: list[int]


def by_stored_name(model: PreTrainedModel, base: Path) -> dict[str, torch.nn.Parameter]:
    """The loaded model's parameters by the names that their tensors have in the base's files."""
    own = dict(model.named_parameters(remove_duplicate=False))
    places = text_model.places_in_memory(model, stored_tensors(base))
    return {name: own[place] for name, place in places.items() if place in own}


def can_hold(model: PreTrainedModel, base: Path, names: Iterable[str]) -> bool:
    """Whether each of these tensors of the base is a parameter of the loaded model, of the same shape."""
    held = {name: tuple(value.shape) for name, value in by_stored_name(model, base).items()}
    stored = stored_tensors(base)
    return all(name in stored and held.get(name) == tuple(stored[name].shape) for name in names)


def hold(model: PreTrainedModel, base: Path, deltas: Deltas, context: Context) -> None:
    """Give the model's parameters the values that merge_weights would write for `deltas`, in the model's own dtype.

    On a GPU they are computed there and not brought back: bf16 is rounded with random numbers of the GPU's own, so that
    a weight may be the other of its two neighbours.
    """
    parameters = by_stored_name(model, base)
    on_gpu = model.device.type == "cuda"
    device = "cuda" if on_gpu else sums_device(deltas, context)
    random = torch.Generator(device).manual_seed(0)
    for file in shard_files(base):
        changed = [block for block in blocks(layout(base / file), deltas) if isinstance(block, ChangedBlock)]
        if on_gpu:
            changed = whole_tensors(changed)
        with opened(base / file) as source:
            values = partial(_values, source.fileno(), None if on_gpu else device)
            for block, data in in_threads(values, changed, 4 if on_gpu else threads_for(deltas, context)):
                dtype = DTYPES[block.tensor.dtype]
                start = (block.start - block.tensor.start) // dtype.itemsize
                new = torch.from_numpy(data).view(dtype)
                if on_gpu:
                    new = _changed_on_gpu(new, block, random)
                parameters[block.tensor.name].data.view(-1)[start : start + len(new)].copy_(new)


def _values(source: int, device: str | None, block: ChangedBlock) -> tuple[ChangedBlock, Bytes]:
    """The block's bytes, changed on `device`; None: as they are in the file."""
    data = read_bytes(source, block.start, block.stop)
    return block, data if device is None or isinstance(block.delta, AsStored) else block.changed(data, device)


def whole_tensors(changed: list[ChangedBlock]) -> list[ChangedBlock]:
    """One block for each tensor: fewer and larger pieces of work, for a GPU."""
    firsts = [block for block in changed if block.first == 0]
    return [replace(block, start=block.tensor.start, stop=block.tensor.stop) for block in firsts]


def _changed_on_gpu(stored: torch.Tensor, block: ChangedBlock, random: torch.Generator) -> torch.Tensor:
    weight = stored.view(-1, *block.tensor.shape[1:]).cuda()
    if isinstance(block.delta, AsStored):
        return weight.view(-1)
    exact = block.delta.apply(weight.float(), block.first).contiguous()
    if stored.dtype != torch.bfloat16:
        return exact.to(stored.dtype).view(-1)
    # As stochastic_rounding does it: what bf16 can hold stays as it is.
    bits = exact.view(torch.int32)
    bits = bits + torch.randint(-0x8000, 0x8000, bits.shape, dtype=torch.int32, device=bits.device, generator=random)
    return (bits + 0x8000).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16).view(-1)


def losses(model: PreTrainedModel, rows: list[TokenRow]) -> list[tuple[float, int]]:
    """(nats in all, labelled tokens) of each row, several rows in a pass."""
    examples = [LabelledRow(row["input_ids"], row["labels"]) for row in rows]
    found = heldout_loss.row_losses(model, examples, Progress.silent())
    return [(float(own.sum()), len(own)) for own in found]
