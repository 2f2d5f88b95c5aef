"""Weights that a merge would write, in a loaded model instead of a file: candidates cost no room on the disk."""

from collections.abc import Iterable
from dataclasses import dataclass
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
    """Give the model's parameters the values that merge_weights would write for `deltas`, in the model's own dtype."""
    parameters = by_stored_name(model, base)
    device = sums_device(deltas, context)
    for file in shard_files(base):
        changed = [block for block in blocks(layout(base / file), deltas) if isinstance(block, ChangedBlock)]
        with opened(base / file) as source:
            values = partial(_values, source.fileno(), device)
            for block, data in in_threads(values, changed, threads_for(deltas, context)):
                dtype = DTYPES[block.tensor.dtype]
                start = (block.start - block.tensor.start) // dtype.itemsize
                new = torch.from_numpy(data).view(dtype)
                parameters[block.tensor.name].data.view(-1)[start : start + len(new)].copy_(new)


def _values(source: int, device: str, block: ChangedBlock) -> tuple[ChangedBlock, Bytes]:
    data = read_bytes(source, block.start, block.stop)
    return block, data if isinstance(block.delta, AsStored) else block.changed(data, device)


def losses(model: PreTrainedModel, rows: list[TokenRow]) -> list[tuple[float, int]]:
    """(nats in all, labelled tokens) of each row, several rows in a pass."""
    examples = [LabelledRow(row["input_ids"], row["labels"]) for row in rows]
    found = heldout_loss.row_losses(model, examples, Progress.silent())
    return [(float(own.sum()), len(own)) for own in found]
