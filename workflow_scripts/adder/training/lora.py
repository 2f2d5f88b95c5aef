"""The LoRA adapter: where its pairs go, how they begin, at which rates they learn, and how they are saved."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core import text_model
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.labels import IGNORE_INDEX
from adder.core.safetensors_layout import DTYPES, stored_tensors
from adder.training import adaptable_layers
from adder.training.base_model import bare_model
from adder.training.best_weights import trained_state
from adder.training.distributed import collectives, fsdp
from adder.training.packed_dataset import PackedExamples
from adder.training.records import TrainInputs
from adder.training.stage import TrainSettings, refuse_mismatch

# PEFT's value for each of ours. LoftQ's start is made here, for weights that are quantised already.
STARTS = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "loftq": True, "eva": "eva"}
# Starts that are not zero: what was learnt is the pair less its start.
NONZERO_STARTS = ("pissa", "olora", "loftq")
EVA_BATCHES = 32  # different batches that EVA looks at, again and again until its directions settle


def add_adapter(model: PreTrainedModel, settings: TrainSettings, earlier: Path | None = None) -> PeftModel:
    """Put LoRA pairs on the modules that settings name, and make whole modules trainable; all of it in fp32.

    `earlier`: an adapter to go on from, which must be what settings say. Raises UserError for names that don't fit the
    model, and for what could be trained but not merged.
    """
    if earlier is not None:
        return _go_on(model, settings, earlier)
    wanted, linear, dtype = settings.target_modules, linear_names(model), model.dtype
    _check_modules_to_save(model, settings)
    stored = _stored(model)
    try:
        if isinstance(wanted, str) and wanted != "all-linear":
            re.compile(wanted)
        config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions too
            lora_dropout=settings.lora_dropout,
            target_modules=linear if wanted == "all-linear" else _text_only(model, wanted),
            modules_to_save=list(settings.modules_to_save) or None,
            # A model that stores one tensor for embedding and LM head must come out with one.
            ensure_weight_tying=_trains_tied(model, settings.modules_to_save),
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            init_lora_weights=STARTS[settings.init_lora_weights],
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        reason = str(error).partition("(\n")[0]  # PEFT prints a module with all that is in it
        raise UserError(
            f"train.target_modules: {wanted} does not fit this model ({reason}); "
            f"its linear layers are called {', '.join(linear)}"
        ) from error
    _check_mergeable(adapted, wanted, linear, stored)
    keep_fp32(adapted)
    _keep_dtype_between_modules(adapted, dtype)
    if settings.init_lora_weights == "loftq":
        _start_from_quantisation_error(adapted, stored)
    if settings.init_lora_weights in NONZERO_STARTS:
        pairs = ((name, _pair(layer)) for name, layer in layers(adapted))
        start = {name: (a.cpu().clone(), b.cpu().clone()) for name, (a, b) in pairs}
        adapted.lora_start = start  # pyright: ignore[reportArgumentType] - a plain attribute
    return adapted


def _go_on(model: PreTrainedModel, settings: TrainSettings, earlier: Path) -> PeftModel:
    """The adapter in the folder `earlier` on the model, to be trained further."""
    dtype, name = model.dtype, settings.adapter or str(earlier)
    stored = read_json(earlier / "adapter_config.json")
    refuse_mismatch(stored, settings, name)
    linear = linear_names(model)
    targets = stored.get("target_modules")
    if settings.target_modules == "all-linear" and (not isinstance(targets, list) or sorted(targets) != linear):
        raise UserError(
            f"model.adapter: train.target_modules is all-linear, here [{', '.join(linear)}], and {name} has {targets}"
        )
    config = LoraConfig.from_pretrained(str(earlier))
    assert isinstance(config, LoraConfig)
    config.inference_mode, config.lora_dropout = False, settings.lora_dropout
    config.init_lora_weights = True  # the pairs' values are read; a start from the weights would change these
    stored_places = _stored(model)
    adapted = get_peft_model(model, config)
    _check_mergeable(adapted, settings.target_modules, linear, stored_places)
    _read_pairs(adapted, earlier, name)
    keep_fp32(adapted)
    _keep_dtype_between_modules(adapted, dtype)
    return adapted


def _read_pairs(model: PeftModel, folder: Path, name: str) -> None:
    """Give the model's adapter the values in `folder`. Raises UserError unless each has a place, and each place one."""
    values = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model)
    try:
        found = set_peft_model_state_dict(model, values)
    except RuntimeError as error:
        raise UserError(
            f"model.adapter: {name} doesn't fit this model: {' '.join(str(error).split())[:300]}"
        ) from error
    odd = sorted({*found.unexpected_keys, *(own.keys() - values.keys())})
    if odd:
        raise UserError(
            f"model.adapter: {name} doesn't fit this model: {odd[0]} (and {len(odd) - 1} more) has no partner"
        )


def merge_first(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with the adapter in its weights, for a full training from there; what was trained before still is."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name in trained)
    return merged


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's linear layers that can have a pair, the last part where that is enough; sorted.

    Left out are the LM head, routers and whatever else of adaptable_layers.unadaptable, and names by which PEFT would
    adapt experts that the model holds in one tensor, as gate_proj in a mixture of experts some of whose layers are
    dense: it takes such a name for the experts of all layers.
    """
    config = LoraConfig(target_modules=adaptable_layers.targets(model, adaptable_layers.adaptable(model)))
    convert_peft_config_for_transformers(config, model, None)
    return sorted(config.target_modules or ())


def _text_only(model: PreTrainedModel, wanted: str | list[str]) -> str | list[str]:
    """The layers that settings name without those of a part that doesn't read text.

    Raises UserError for others that can't have a pair, and for a pattern that takes in any.
    """
    left, taken = adaptable_layers.unadaptable(model), []
    for name in adaptable_layers.linear_layers(model):
        is_named = (
            re.fullmatch(wanted, name) if isinstance(wanted, str) else any(f".{name}".endswith(f".{w}") for w in wanted)
        )
        if is_named:
            taken.append(name)
    odd = {name: left[name] for name in taken if name in left}
    if not odd:
        return wanted
    refused = [name for name, reason in odd.items() if isinstance(wanted, str) or reason != adaptable_layers.NO_TEXT]
    if refused or len(odd) == len(taken):
        name = (refused or list(odd))[0]
        raise UserError(f"train.target_modules: {wanted} takes in {name}, which {odd[name]}; leave it out")
    return adaptable_layers.targets(model, [name for name in taken if name not in odd])


def _stored(model: PreTrainedModel) -> dict[str, str] | None:
    """Where the model's parameters lie in the directory that it was loaded from; None where it was made otherwise."""
    folder = Path(model.name_or_path or "")
    return text_model.places_on_disk(model, folder) if (folder / "config.json").is_file() else None


def layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """The modules that have a LoRA pair, by their names in the base model."""
    for name, module in bare_model(model).named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def lora_config(model: PeftModel) -> LoraConfig:
    """The configuration of the adapter."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return config


def _pair(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert isinstance(a, torch.nn.Linear) and isinstance(b, torch.nn.Linear)
    return a.weight.data, b.weight.data


def _check_modules_to_save(model: PreTrainedModel, settings: TrainSettings) -> None:
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    for wanted in settings.modules_to_save:
        # PEFT takes any module whose name ends so.
        found = [name for name in modules if name.endswith(wanted)]
        if not found:
            own = sorted({name.rpartition(".")[2] for name, m in modules.items() if _has_own_weight(m)})
            raise UserError(
                f"train.modules_to_save: {wanted} is no module of this model; its modules are called {', '.join(own)}"
            )
        for name in found:
            inner = [m for m in modules[name].modules() if isinstance(m, torch.nn.Linear) and m is not head]
            if settings.method == "qlora" and inner:
                raise UserError(
                    f"train.modules_to_save: {name} is quantised to NF4 by train.method: qlora, and 4-bit weights "
                    "can't be trained whole; give it a LoRA pair (train.target_modules), or use train.method: lora"
                )


def _has_own_weight(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _trains_tied(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether a module to be trained whole is an embedding or LM head that share one tensor."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    return tied and any(m in ends for name, m in model.named_modules() if name.endswith(tuple(names) or ("\0",)))


def _check_mergeable(
    model: PeftModel, wanted: str | list[str], linear: list[str], stored: dict[str, str] | None
) -> None:
    """Refuse before training what merge would refuse after it. `stored`: as _stored returns it."""
    config = lora_config(model)
    if config.target_parameters:
        raise UserError(
            f"train.target_modules: {wanted} would adapt {', '.join(sorted(config.target_parameters))}, a weight of "
            "an expert or router that this model stores outside of a linear layer; merging it isn't supported. Name "
            f"linear layers instead: {', '.join(linear)}"
        )
    adapted = [f".{name}" for name, _ in layers(model)]
    for name in [] if isinstance(wanted, str) else wanted:
        if not any(found.endswith(f".{name}") for found in adapted):  # PEFT is content where another name fits
            raise UserError(
                f"train.target_modules: {name} is no layer of this model that can be adapted; its linear layers are "
                f"called {', '.join(linear)}"
            )
    head = bare_model(model).get_output_embeddings()
    for name, layer in layers(model):
        if stored is not None and f"{name}.weight" not in stored:
            raise UserError(
                f"train.target_modules: {wanted} takes in {name}, whose weight the model's files hold in another form, "
                "joined with others or in parts; merging a pair into it isn't supported"
            )
        if not isinstance(layer.get_base_layer(), torch.nn.Linear) and not _is_conv1d(layer.get_base_layer()):
            raise UserError(
                f"train.target_modules: {wanted} takes in {name}, which is no linear layer; embeddings are trained "
                "whole (train.modules_to_save)"
            )
        if layer is head:
            raise UserError(
                f"train.target_modules: {wanted} takes in {name}, the LM head, whose loss is computed without going "
                "through its pair; it can be trained whole (train.modules_to_save)"
            )


def _is_conv1d(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def keep_fp32(model: torch.nn.Module) -> None:
    """Hold everything that an adapter trains in fp32: in 16 bits small updates are lost to rounding.

    PEFT leaves whole modules in the base's dtype, and TRL casts the pairs of a quantised model to bf16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _keep_dtype_between_modules(model: PeftModel, dtype: torch.dtype) -> None:
    """Let what is trained in fp32 give the base's `dtype`, in which attention kernels and the rest expect numbers.

    Modules trained whole would give fp32, and so would DoRA on an NF4 layer under autocast.
    """
    if dtype == torch.float32:
        return

    def enter(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        own = next(module.parameters()).dtype
        return tuple(x.to(own) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    def leave(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(dtype) if torch.is_tensor(output) else output

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for inner in module.modules_to_save.values():
                inner.register_forward_pre_hook(enter)
                inner.register_forward_hook(leave)
        elif isinstance(module, LoraLayer) and len(module.lora_magnitude_vector):
            module.register_forward_hook(leave)


def _start_from_quantisation_error(model: PeftModel, stored: dict[str, str] | None) -> None:
    """Start each pair as the best rank-r approximation of what quantisation took from its weight (LoftQ).

    Li et al. 2023, arXiv:2310.08659, with the quantised weight as it is (one step). As PEFT's
    `replace_lora_weights_loftq`, but also where NF4 values are held dequantised, and divided by the pair's scale, which
    PEFT leaves out: with lora_alpha / lora_r = 2 its start would be as far off as zero is.
    """
    folder = Path(bare_model(model).name_or_path or "")
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        raise UserError(
            "train.init_lora_weights: loftq makes up for what quantisation took from weights, and this base came in "
            "4 bit, without the weights that it was made from"
        )
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    for name, layer in layers(model):
        place = (stored or {}).get(f"{name}.weight")
        if place is None:
            raise UserError(f"train.init_lora_weights: loftq needs {name}.weight, which {folder} doesn't hold")
        quantised = dequantize_module_weight(layer.get_base_layer()).data.float()
        with safe_open(files[place], "pt") as tensors:
            error = tensors.get_tensor(place).to(quantised.device).float() - quantised
        rank = layer.r["default"]
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = _pair(layer)
        a.copy_(root[:, None] * v[:rank])
        b.copy_(u[:, :rank] * root / layer.scaling["default"])
        if "default" in layer.lora_magnitude_vector:  # DoRA starts from the norm of base + pair
            whole = quantised + layer.scaling["default"] * b @ a
            layer.lora_magnitude_vector["default"].weight.data = whole.norm(dim=1)


def initialise(model: PeftModel, packs: PackedExamples, settings: TrainSettings) -> None:
    """Start the A matrices from the data where settings ask for it (EVA), else do nothing. Run before training.

    EVA (Paischer et al. 2024, arXiv:2410.07170): the directions in which each layer's inputs at labelled positions vary
    most, and more rank where they explain more. Raises UserError when there are too few labelled tokens for that.
    """
    if settings.init_lora_weights != "eva":
        return
    config = lora_config(model)
    assert config.eva_config is not None
    needed = round(config.r * config.eva_config.rho)
    batches = _eva_batches(packs, needed)
    if not batches:
        raise UserError(
            f"train.init_lora_weights: eva needs {needed} labelled tokens for train.lora_r: {config.r}, and the "
            "training examples have fewer"
        )

    def forward(peft_model: PeftModel, batch: dict[str, Any]) -> Any:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        return bare_model(peft_model).base_model(use_cache=False, **inputs)

    initialize_lora_eva_weights(model, dataloader=batches, forward_fn=forward, show_progress_bar=False)
    keep_fp32(model)  # PEFT makes a pair anew where the rank changes


def _eva_batches(packs: PackedExamples, needed: int) -> list[dict[str, Any]]:
    """The first packs, in batches of at least `needed` labelled tokens: the decomposition takes no smaller ones."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batches, group, labelled = [], [], 0
    for number in range(len(packs.seq_lengths)):
        pack = packs.pack(number)
        group.append({name: pack[name].tolist() for name in ("input_ids", "labels", "seq_lengths")})
        labelled += int((pack["labels"] != IGNORE_INDEX).sum())
        if labelled >= needed:
            batches.append(collate(group))
            group, labelled = [], 0
        if len(batches) == EVA_BATCHES:
            break
    return batches


def optimizer_groups(model: torch.nn.Module, settings: TrainSettings) -> list[dict[str, Any]] | None:
    """Parameter groups of LoRA+ with the rate and weight decay of each; None where settings don't ask for it.

    The B matrices learn at `lora_plus_ratio` times the learning rate, all else at the rate itself; vectors don't decay.
    The first group has the rate that is set, since that is the one a trainer logs. Hayou et al. 2024, arXiv:2402.12354.
    """
    ratio = settings.lora_plus_ratio
    if ratio is None:
        return None
    rate = settings.learning_rate
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((".lora_B." in name, parameter.ndim < 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate * (ratio if is_b else 1),
            "weight_decay": 0.0 if is_vector else settings.weight_decay,
        }
        for (is_b, is_vector), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def create_optimizer(
    model: PreTrainedModel | PeftModel, arguments: TrainingArguments, settings: TrainSettings
) -> torch.optim.Optimizer | None:
    """Return the trainer's kind of optimizer over `optimizer_groups`, for its `optimizers=`; None to leave it alone."""
    groups = optimizer_groups(model, settings)
    if groups is None:
        return None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # pyright: ignore[reportArgumentType] - any
    return kind(groups, **options)


def save(model: PreTrainedModel | PeftModel, inputs: TrainInputs, out: Path) -> None:
    """Write the adapter in PEFT's form (or the full model in 16 bit), the same bytes for the same weights.

    The adapter is an ordinary one for the base as it was downloaded, whatever its pairs began with. To be called in
    every rank.
    """
    if not isinstance(model, PeftModel):
        _save_full_model(model, inputs.base, out / "model")
    elif collectives.is_main():
        _save_adapter(model, inputs.model / "source.json", out / "adapter")


def _save_full_model(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Save the weights in the dtype that most of the base's have; merging puts them into the base's files."""
    largest = max(stored_tensors(base).values(), key=lambda tensor: tensor.stop - tensor.start)
    model.to(DTYPES.get(largest.dtype, torch.bfloat16))  # pyright: ignore[reportArgumentType] - hidden by a decorator
    state = trained_state(model) if fsdp.trains_shards(model) else None
    if collectives.is_main():
        model.save_pretrained(folder, state_dict=state)


def _save_adapter(model: PeftModel, source: Path, folder: Path) -> None:
    origin, config = read_json(source), lora_config(model)
    # Not the path of this machine's copy: an adapter is loaded elsewhere.
    config.base_model_name_or_path, config.revision = origin["source"], origin["revision"]
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the merged model has a real one
    start: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = getattr(model, "lora_start", None)
    if start is not None:
        _subtract_start(folder, start)
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text())
    for name in ("target_modules", "modules_to_save"):  # sets, in an order of their own; a pattern is a string
        stored[name] = sorted(stored[name]) if isinstance(stored[name], list) else stored[name]
    write_json(path, stored)


def _subtract_start(folder: Path, start: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make pairs that began with B0 A0 into pairs for the original base, of twice the rank: B A - B0 A0.

    PiSSA and OLoRA took B0 A0 out of the base's weights, and LoftQ's stands for what quantisation took out of them: in
    each case base + B0 A0 is the original. As PEFT's `path_initial_model_for_weight_conversion`, which would drop
    DoRA's magnitudes and whole modules, and doesn't know LoftQ.
    """
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, (a, b) in start.items():
        of_a, of_b = (f"base_model.model.{name}.lora_{kind}.weight" for kind in "AB")
        tensors[of_a] = torch.cat([tensors[of_a], a.to(tensors[of_a].dtype)], dim=0)
        tensors[of_b] = torch.cat([tensors[of_b], -b.to(tensors[of_b].dtype)], dim=1)
    save_file(tensors, path, {"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # The scale is alpha / r, with rank-stabilised LoRA alpha / sqrt(r): it must stay what it was.
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "init_lora_weights": True}
    path.write_text(json.dumps(config))
