"""The text model of a checkpoint: by which of transformers' classes it loads, and where its parameters lie on disk.

Checkpoints of models that also see or hear are trained on text: what else they hold stays as it is on disk. Names on
disk are often others than in memory; transformers itself says which belong together.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

# Not public in transformers, but what from_pretrained itself finds parameters by.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from adder.core.errors import UserError
from adder.core.safetensors_layout import Stored, stored_tensors


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model directory. Raises UserError for a kind of model that transformers doesn't know."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError) as error:
        import transformers

        reason = str(error).strip().split("\n")[0].partition(". ")[0]
        raise UserError(
            f"{folder}: transformers {transformers.__version__} can't read its config.json: {reason}"
        ) from None


def auto_class(config: PreTrainedConfig) -> type[Any]:
    """The Auto class that gives this model with its LM head, the text half alone where transformers has that.

    Raises UserError where there is none.
    """
    for kind, known in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in known and not config.is_encoder_decoder:
            return kind
    raise UserError(
        f"a model of the type {config.model_type} is no causal language model for transformers, which predicts each "
        "token from those before it; Adder trains no other"
    )


def load(folder: Path | str, **options: Any) -> PreTrainedModel:
    """from_pretrained of the model directory's text model."""
    folder = Path(folder)
    return auto_class(read_config(folder)).from_pretrained(folder, local_files_only=True, **options)


def without_weights(folder: Path) -> PreTrainedModel:
    """The model directory's text model with all its modules, on the meta device."""
    config = read_config(folder)
    with init_empty_weights():
        return auto_class(config).from_config(config)


def places_in_memory(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """For each of the tensors' names on disk that of the model's parameter or buffer that it is loaded into, as it is.

    Left out are tensors that the model doesn't take, and those of which several are joined into one, or one split.
    """
    own = _meta_state(model)
    return {name: place for name, place, joined in _destinations(model, stored) if not joined and place in own}


def places_on_disk(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """For each of the model's parameters that has a tensor of its own in `folder` that tensor's name.

    Tied parameters have one place, under the name of each of them.
    """
    found = {place: name for name, place in places_in_memory(model, stored_tensors(folder)).items()}
    for name, partner in tied(model).items():
        if partner in found:
            found.setdefault(name, found[partner])
    return found


def lacking(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Names of the model's parameters for which the tensors on disk have nothing."""
    own = _meta_state(model)
    found = {place for _, place, _ in _destinations(model, stored)}
    # One tensor may be split into several.
    found |= {target for converter in _transforms(model)[1] for target in _split_targets(converter, found, own)}
    for name, partner in tied(model).items():
        if name in found or partner in found:
            found |= {name, partner}
    return sorted(name for name, _ in model.named_parameters() if name not in found)


def unused(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Names of the tensors on disk that from_pretrained leaves aside, since the model has no parameter for them."""
    own = _meta_state(model)
    return [name for name, place, _ in _destinations(model, stored) if place not in own]


def parameters_on_disk(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Names of the tensors on disk that become parameters of the model, alone or with others; buffers are none."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return [name for name, place, joined in _destinations(model, stored) if joined or place in own]


def misshapen(model: PreTrainedModel, stored: Mapping[str, Stored]) -> tuple[str, tuple[int, ...]] | None:
    """A tensor on disk that the model holds in another shape: its name, and the model's shape. None where none is."""
    own = _meta_state(model)
    for name, place in places_in_memory(model, stored).items():
        if tuple(own[place].shape) != stored[name].shape:
            return name, tuple(own[place].shape)
    return None


def _destinations(model: PreTrainedModel, stored: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Of each tensor's name on disk the parameter that from_pretrained puts it into, and whether with others or split.

    In from_pretrained's order, which some renamings depend on; what a renaming makes unknown keeps its name, as there.
    """
    renamings, converters = _transforms(model)
    own = _meta_state(model)
    for name in sorted(stored, key=dot_natural_key):
        place, joined = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if place not in own and name in own:
            place, joined = rename_source_key(name, [], [], model.base_model_prefix, own)
        yield name, place, joined is not None


def _split_targets(converter: WeightConverter, found: set[str], own: dict[str, Any]) -> set[str]:
    targets = converter.target_patterns
    if len(targets) < 2:
        return set()
    return {
        name.replace(targets[0], other)
        for name in found
        if targets[0] in name
        for other in targets[1:]
        if name.replace(targets[0], other) in own
    }


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are one tensor with another one, most often the LM head with the embedding: {name: the other}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def text_modules(model: PreTrainedModel) -> str:
    """Name of the module that holds the layers which read text: "" where that is all of the model."""
    decoder = model.get_decoder()
    if decoder is model:
        return ""
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _transforms(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    found = get_model_conversion_mapping(model)
    renamings = [one for one in found if isinstance(one, WeightRenaming)]
    return renamings, [one for one in found if isinstance(one, WeightConverter)]


def _meta_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
