"""At the beginning of a run: can this model be trained rightly on these packs, and by what settings say?

A training looks at the whole model before its first step. Evaluating the base comes before that and may take hours, so
the same is tried here on the model's first layers, as many as show each kind of layer that it has, with their own
weights. All of it is tried where settings name layers by their place, or an adapter to go on from has all of them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, set_seed

from adder.core import hardware, precision, text_model
from adder.core.choice import ChoiceRecord
from adder.core.errors import UserError
from adder.core.files import write_json
from adder.core.progress import Progress
from adder.core.rng import undisturbed
from adder.core.safetensors_layout import stored_tensors
from adder.core.stage_spec import Context
from adder.kernels.trials import decide as trials
from adder.kernels.trials import shapes
from adder.tokenization.token_table import TokenTable
from adder.training import base_model, isolation_check, lora
from adder.training.packed_dataset import PackedExamples
from adder.training.stage import IsolationSettings, TrainSettings

PROMPT = 8  # tokens that a reply is tried behind
# How layers call their own place, in which alike ones differ.
PLACES = ("layer_idx", "layer_id", "layer_number", "idx", "index", "block_idx", "layer_index")
Kind = tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class IsolationInputs:
    """Folders of the stages that are read."""

    lengths: Path
    tokenize: Path
    model: Path


class IsolationRecord(TypedDict):
    """check.json. attention: how packs will be computed, and why; layers: that were tried; of: that the model has."""

    attention: ChoiceRecord
    layers: int
    of: int


def run(settings: IsolationSettings, inputs: IsolationInputs, out: Path, context: Context) -> IsolationRecord:
    """Write check.json. Raises UserError for a model that can't be trained so, with architecture and reason."""
    hardware.use_threads(context.threads)
    device = context.device
    if device == "cuda":
        hardware.prepare_gpu()
    dtype: str = precision.compute_dtype(device, settings.compute_dtype).value
    train = TrainSettings(reshuffle=False, **settings.model_dump(exclude={"merge_base"}))
    folder, packed, adapter = (inputs.model / name for name in ("model", "packed", "adapter"))
    weights = packed if settings.method == "qlora" and packed.is_dir() else folder
    if settings.method == "qlora" and weights is folder and settings.merge_base == "dequantized":
        base_model.dequantisable_weights(folder)  # refused now rather than after the training
    whole = text_model.read_config(weights)
    _refuse_unknown_tokens(TokenTable(inputs.tokenize / "train.arrow"), whole, folder)
    layers = whole.get_text_config().num_hidden_layers
    few = first_of_each_kind(whole) if _names_no_layer(settings) and not adapter.is_dir() else None
    if few and text_model.misshapen(_empty(few), stored_tensors(folder)):
        few = None  # some of its tensors are as large as it has layers
    tried = few.get_text_config().num_hidden_layers if few else layers
    context.progress.say(f"trying packs on {tried} of the model's {layers} layers, on {device} in {dtype}")
    set_seed(train.seed)
    if device == "cuda":  # what training will ask as well, and then finds answered
        sizes, kept = shapes.of_config(whole, dtype), context.results / trials.FOLDER
        trials.decide("full", sizes, f"cuda:{torch.cuda.current_device()}", kept, Progress.silent())
    model, base = base_model.load(weights, settings.method, dtype, device, config=few)
    trained = model
    if settings.method != "full":
        trained = lora.add_adapter(model, train, adapter if adapter.is_dir() else None)
    packs = PackedExamples(inputs.tokenize / "train.arrow", inputs.lengths / "packs.parquet", 0, False)
    prompt = packs.pack(0)["input_ids"][:PROMPT]
    wordless = reply_problem(trained, prompt, dtype)
    if wordless and few:  # it may be for want of the other layers
        wordless = reply_problem(base_model.load(weights, settings.method, dtype, device)[0], prompt, dtype)
    if wordless:
        raise UserError(f"model.source: {type(model).__name__} can't write replies here: {wordless}")
    attention = isolation_check.choose_isolation(
        trained, packs.pack(0), dtype, base.attention, longest=packs.longest_example()
    )
    if attention is not base.attention:
        context.progress.say(f"attention: {attention.value}: {attention.reason}")
    record: IsolationRecord = {"attention": attention.to_dict(), "layers": tried, "of": layers}
    write_json(out / "check.json", record)
    return record


def _refuse_unknown_tokens(table: TokenTable, config: PreTrainedConfig, folder: Path) -> None:
    """UserError for a token id that the model has no embedding for: the tokenizer knows more tokens than the model."""
    largest, known = table.largest_id(), config.get_text_config().vocab_size
    if largest >= known:
        token = AutoTokenizer.from_pretrained(folder, local_files_only=True).convert_ids_to_tokens(largest)
        raise UserError(
            f"model.source: the training examples hold the token {token!r} (id {largest}), and the model has "
            f"embeddings for {known:,} tokens only: its tokenizer was given more. Use the model's own tokenizer and "
            "chat template, or a model whose embeddings were resized"
        )


def reply_problem(model: PreTrainedModel | PeftModel, prompt: NDArray[np.int64], dtype: str) -> str | None:
    """Why a few tokens can't be generated, which evaluation and the proof of the merge need; None where they can.

    Architectures whose layers keep no keys, or whose code for it is broken, train well and fail then.
    """
    bare = base_model.bare_model(model)
    own = "sdpa" if getattr(bare, "_supports_sdpa", False) else "eager"
    ids = torch.tensor(prompt, device=bare.device)[None]
    autocast = torch.autocast(bare.device.type, getattr(torch, dtype), enabled=dtype != "float32")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    write: Any = bare.generate
    try:
        with undisturbed(), isolation_check.evaluating(model), isolation_check.attention_by(bare, own), autocast:
            write(ids, attention_mask=torch.ones_like(ids), **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models fail in any way that they like
        return f"its code fails in generating with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _names_no_layer(settings: IsolationSettings) -> bool:
    """Whether what is to be trained is named the same in all layers: not by a pattern or by a place among them."""
    names = settings.target_modules if isinstance(settings.target_modules, list) else []
    by_name = settings.target_modules == "all-linear" or bool(names)
    return by_name and not any(name.isdigit() for one in [*names, *settings.modules_to_save] for name in one.split("."))


def first_of_each_kind(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration with only so many of the first layers as have one of each kind in them.

    None where that is all of them, or where a model with fewer layers isn't the beginning of the whole one.
    """
    try:
        kinds = layer_kinds(config)
        needed = 1 + max(kinds.index(kind) for kind in set(kinds))
        if needed >= len(kinds):
            return None
        few = _with_layers(config, len(kinds), needed)
        return few if layer_kinds(few) == kinds[:needed] else None
    except Exception:  # any architecture may build its layers in a way of its own; then all of them are tried
        return None


def layer_kinds(config: PreTrainedConfig) -> list[Kind]:
    """Of each decoder layer what it is made of: its modules by name, their classes and what these were built with."""
    model = _empty(config)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
    return [tuple(_made_of(name, module) for name, module in layer.named_modules()) for layer in layers]


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights."""
    with init_empty_weights():
        return text_model.auto_class(config).from_config(config)


def _made_of(name: str, module: torch.nn.Module) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    own = vars(module).items()
    plain = [(key, str(value)) for key, value in own if isinstance(value, int | float | str | bool | None)]
    shapes = [(key, str(tuple(value.shape))) for key, value in module.named_parameters(recurse=False)]
    return name, type(module).__name__, tuple(sorted([pair for pair in plain if pair[0] not in PLACES] + shapes))


def _with_layers(config: PreTrainedConfig, layers: int, wanted: int) -> PreTrainedConfig:
    """The same with `wanted` of its `layers`; what the configuration lists by layer is cut to the same length."""
    few = copy.deepcopy(config)
    text = few.get_text_config()
    values: Mapping[str, Any] = text.to_dict()
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, value[:wanted])
    text.num_hidden_layers = wanted
    return few
