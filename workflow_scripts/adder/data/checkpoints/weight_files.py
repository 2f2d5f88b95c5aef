"""Whether a model directory's weights can be what its config.json makes of them: numbers, in floats, each once."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from adder.core import text_model
from adder.core.errors import UserError
from adder.core.safetensors_layout import DTYPES, layout, shard_files, stored_tensors


def refuse_repeated(folder: Path, source: str) -> None:
    """UserError where two files hold a tensor of one name: which of them is meant can't be known."""
    seen: dict[str, str] = {}
    for file in shard_files(folder):
        for tensor in layout(folder / file).tensors:
            if tensor.name in seen:
                raise UserError(f"model.source: {source} has {tensor.name} twice, in {seen[tensor.name]} and in {file}")
            seen[tensor.name] = file


def refuse_odd_values(model: PreTrainedModel, folder: Path, source: str, threads: int) -> None:
    """UserError where a weight that the model uses is in no usual float, not finite, or tied to another one.

    Reads all of them once. model: of the directory, without weights.
    """
    stored = stored_tensors(folder)
    used = text_model.parameters_on_disk(model, stored)
    odd = next((stored[name] for name in used if stored[name].dtype not in DTYPES), None)
    if odd:
        raise UserError(
            f"model.source: {source} stores {odd.name} in {odd.dtype}; weights must be in {', '.join(DTYPES)}"
        )
    files = [safe_open(folder / file, "pt") for file in shard_files(folder)]
    file_of = {name: opened for opened in files for name in opened.keys()}
    torch.set_num_threads(threads)

    def value(name: str) -> torch.Tensor:
        return file_of[name].get_tensor(name)

    broken = [name for name in used if not _is_finite(value(name))]
    if broken:
        numbers = int((~torch.isfinite(value(broken[0]))).sum())
        more = f", and {len(broken) - 1} more tensors have some" if len(broken) > 1 else ""
        raise UserError(
            f"model.source: {numbers:,} of the numbers in {broken[0]} of {source} are infinite or none at all (NaN)"
            f"{more}: nothing can be computed with them"
        )
    _refuse_untied(model, stored, value, source)


def _is_finite(tensor: torch.Tensor) -> bool:
    """The sum is not finite where a number isn't: that takes one pass and no memory."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _refuse_untied(
    model: PreTrainedModel, stored: Iterable[str], value: Callable[[str], torch.Tensor], source: str
) -> None:
    on_disk = {place: name for name, place in text_model.places_in_memory(model, stored).items()}
    for one, other in text_model.tied(model).items():
        names = on_disk.get(one), on_disk.get(other)
        if names[0] and names[1] and names[0] != names[1] and not torch.equal(value(names[0]), value(names[1])):
            raise UserError(
                f"model.source: {source} has a {names[0]} other than its {names[1]}, and its config.json says that "
                "they are one (tie_word_embeddings), of which loaders make one model or another; in a local copy, set "
                f"tie_word_embeddings: false, or leave {names[0]} out"
            )
