"""Where the tensors of a full training belong in the files of its base."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adder.core import text_model
from adder.core.errors import UserError
from adder.core.safetensors_layout import DTYPES, layout, shard_files, stored_tensors
from adder.merging.weight_deltas import WeightDelta


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor that takes the base's place, read from its file as its rows are needed."""

    file: Path
    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Nothing is multiplied."""
        return 0

    @property
    def by_rows(self) -> bool:
        """Rows are independent."""
        return True

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Those of its rows, in fp32, that begin with row `first` and are as many as the weight's."""
        stored = _opened(self.file)
        rows = stored.get_slice(self.name)[first : first + len(weight)] if self.shape else stored.get_tensor(self.name)
        return rows.reshape(weight.shape).to(weight.device, torch.float32)


@lru_cache(maxsize=4)
def _opened(file: Path) -> Any:
    return safe_open(file, "pt")


def trained_tensors(trained: Path, base: Path) -> dict[str, WeightDelta]:
    """The tensors in `trained`, as save_pretrained wrote them, by the name that each has in `base`.

    That is the same name, or that of the parameter which both are loaded into: a text model that was trained out of a
    checkpoint that sees has other names there. Raises UserError for one that has no place, or one of another shape.
    """
    stored, own = stored_tensors(base), stored_tensors(trained)
    files = {tensor.name: trained / file for file in shard_files(trained) for tensor in layout(trained / file).tensors}
    model = text_model.without_weights(base)
    places = text_model.places_in_memory(model, stored)
    of_place = {
        place: name for name, place in text_model.places_in_memory(text_model.without_weights(trained), own).items()
    }
    partners = text_model.tied(model)
    found: dict[str, WeightDelta] = {}
    used: set[str] = set()
    for name, tensor in stored.items():
        place = places.get(name, "")
        # A base may store a tied LM head a second time.
        source = name if name in own else of_place.get(place) or of_place.get(partners.get(place, ""))
        if source is None or tensor.dtype not in DTYPES:
            continue
        if own[source].shape != tensor.shape:
            was, now = list(tensor.shape), list(own[source].shape)
            raise UserError(f"{trained}: {name} is {now} in the trained model and {was} in its base")
        found[name] = TrainedTensor(files[source], source, tensor.shape)
        used.add(source)
    homeless = sorted(own.keys() - used)
    if homeless:
        raise UserError(f"{trained}: the base in {base} has no place for {homeless[0]}, which was trained")
    return found
