"""Loading the base model for training: in 16 or 32 bit, or quantised to NF4."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert

from adder.core import hardware, text_model
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.safetensors_layout import DTYPES, stored_tensors
from adder.kernels import packed_attention
from adder.training import adaptable_layers

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

# Share of the free memory that the dequantised copy of an NF4 model may take.
DEQUANTISED_SHARE = 0.5

# How a configuration calls the number of its experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Share of the matrices' parameters that may stay unquantised without a word: convolutions of a few taps do.
LEFT_SHARE = 0.02


@dataclass(frozen=True)
class BaseChoices:
    """What was chosen in loading a base: attention for packed examples, and of an NF4 model how its values are held.

    nf4_weights: how much of the model is in NF4, where that is less than one expects.
    """

    attention: Choice
    nf4_values: Choice | None = None
    nf4_weights: Choice | None = None


def load(
    folder: Path,
    method: str,
    dtype: str,
    device: str,
    in_shards: bool = False,
    config: PreTrainedConfig | None = None,
    packs: bool = True,
) -> tuple[PreTrainedModel, BaseChoices]:
    """Load the model in `folder` to be trained by `method` ("qlora", "lora" or "full") in compute dtype `dtype`.

    The weights of a `full` training are fp32 (matmuls run in `dtype` by autocast); frozen ones are kept in `dtype`.
    What is in 4 bit already stays as it is. `in_shards`: the model is to be sharded, and waits in main memory for that;
    NF4 weights stay packed. `config`: one that takes fewer of the layers. Raises UserError for 4-bit weights that
    transformers can't hold so. Without `packs` it has the attention that transformers gives it, for single examples.
    """
    compute: torch.dtype = getattr(torch, dtype)
    whole = config is None
    config = text_model.read_config(folder) if config is None else config
    attention = choose_attention(config, dtype, device) if packs else Choice(None, "there are no packs")
    options: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32 if method == "full" else compute,
        "attn_implementation": attention.value,
        "device_map": {"": torch.cuda.current_device() if device == "cuda" and not in_shards else "cpu"},
    }
    came_packed = getattr(config, "quantization_config", None) is not None
    if method == "qlora" and not came_packed:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=unquantised_modules(text_model.without_weights(folder)),
        )
    with _quantised_on(device) if method == "qlora" and in_shards else nullcontext():
        model = _load_packed(folder, compute, options, whole) if came_packed else text_model.load(folder, **options)
    model.config.use_cache = False
    name_head_cap(model.config)
    if method == "full":
        _freeze_all_but_text(model)
    if method != "qlora":
        return model, BaseChoices(attention)
    keep_cpu_weights_intact(model)
    left = left_unquantised(model, dtype)
    if left is None and came_packed:
        left = Choice("as they came", "the base came in bitsandbytes' 4 bit, and is trained on these very weights")
    values = (
        Choice("dequantised in each product", "processes send each other a layer's weights packed")
        if in_shards
        else choose_nf4_values(model, compute, device)
    )
    if values.value == "dequantised once":
        hold_dequantised(model, compute)
    return model, BaseChoices(attention, values, left)


def _load_packed(folder: Path, compute: torch.dtype, options: dict[str, Any], whole: bool) -> PreTrainedModel:
    """Load 4-bit weights of bitsandbytes as they are, to compute in `compute` whatever the checkpoint says."""
    packed = [name for name in stored_tensors(folder) if ".quant_state." in name]
    start = f"train.method: qlora trains 4-bit weights as they are, and of the {len(packed)} that this checkpoint has "
    instead = "train.method: lora trains on their values in 16 bit"
    try:
        model = text_model.load(folder, **options)
    except (RuntimeError, ValueError, KeyError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{start}transformers can load none ({why}); {instead}") from error
    layers = four_bit_layers(model).values()
    if whole and len(layers) != len(packed):
        raise UserError(f"{start}transformers can load {len(layers)}; {instead}")
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = compute, True
    return model


def quantised_weights(folder: Path) -> dict[str, bool]:
    """Names on disk of the weights that transformers quantises in this model, and whether each is stored (in, out)."""
    from bitsandbytes.nn.modules import Linear4bit

    model = text_model.without_weights(folder)
    places = text_model.places_on_disk(model, folder)
    skipped = unquantised_modules(model)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped))
    quantizer.preprocess_model(model, device_map=None)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    # transformers notes in `source_cls` what a layer was before.
    kinds = {f"{name}.weight": cast(type, layer.source_cls) for name, layer in layers.items()}
    return {places.get(name, name): issubclass(kind, Conv1D) for name, kind in kinds.items()}


def dequantisable_weights(folder: Path) -> dict[str, bool]:
    """The same, for a merge into their dequantised values. Raises UserError where one has no tensor of its own."""
    stored, found = stored_tensors(folder), quantised_weights(folder)
    for name in found:
        if name not in stored or stored[name].dtype not in DTYPES:
            raise UserError(
                f"merge.base: {folder} has no {name} in 16 or 32 bits of its own, so it can't be dequantised; leave "
                "merge.base at auto or original"
            )
    return found


def unquantised_modules(model: PreTrainedModel) -> list[str]:
    """What of a model stays in 16 bits: LM head, routers, layers that don't read text or whose weight code reads."""
    return sorted({*get_keys_to_not_convert(model), *adaptable_layers.unadaptable(model)})


def _freeze_all_but_text(model: PreTrainedModel) -> None:
    """Leave what sees or hears as it is: no text reaches it."""
    text = text_model.text_modules(model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = {
        id(p) for module in (model.get_submodule(text), *ends) if module is not None for p in module.parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained


def name_head_cap(config: PreTrainedConfig) -> None:
    """Give RecurrentGemma's cap on logits the name by which TRL's LM head knows it, and would leave it out else."""
    cap = getattr(config, "logits_soft_cap", None)
    if cap is not None:
        config.final_logit_softcapping = cap


def choose_attention(config: PreTrainedConfig, dtype: str, device: str) -> Choice:
    """As packed_attention.choose_attention; the architecture's own where it takes no other in its place."""
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    architecture = architecture[0] if isinstance(architecture, tuple) else architecture
    if architecture is None or architecture._can_set_attn_implementation():
        return packed_attention.choose_attention(config.get_text_config(), dtype, device)
    own = "sdpa" if architecture._supports_sdpa else "eager"
    return Choice(own, f"{architecture.__name__} has attention of its own, which no other can take the place of")


def bare_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself, without the adapter around it."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(bare, PreTrainedModel)
    return bare


def has_experts(bare: PreTrainedModel) -> bool:
    """Whether the model is a mixture of experts, each of which computes as many tokens as are sent to it."""
    config = bare.config.get_text_config()
    return any((getattr(config, name, None) or 0) > 1 for name in EXPERTS)


@contextmanager
def _quantised_on(device: str) -> Iterator[None]:
    """Let `device` quantise what is loaded into main memory, weight by weight: CPUs take minutes for 8 B parameters."""
    from bitsandbytes.nn.modules import Params4bit

    quantise = Params4bit._quantize

    def there_and_back(self: Params4bit, place: torch.device) -> Params4bit:
        quantise(self, device)
        self.data = self.data.to(place)
        self.quant_state.to(place)
        return self

    Params4bit._quantize = there_and_back  # pyright: ignore[reportAttributeAccessIssue] - untyped, and so replaced
    try:
        yield
    finally:
        Params4bit._quantize = quantise


def keep_cpu_weights_intact(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking NF4 weights on CPUs with AVX512-BF16.

    There a forward pass without gradients (an evaluation) repacks the weights in place, and every gradient after it is
    garbage (seen with bitsandbytes 0.50.2). On other hardware the flag is off already.
    """
    for module in four_bit_layers(model).values():
        module.support_avx512bf16_for_cpu = False


def four_bit_layers(model: torch.nn.Module) -> "dict[str, Linear4bit]":
    """Return the model's bitsandbytes NF4 layers by name."""
    from bitsandbytes.nn.modules import Linear4bit

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def nf4_state(layer: "Linear4bit") -> Any:
    """What unpacks an NF4 layer's weight: bitsandbytes' QuantState."""
    return layer.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue] - of a Params4bit


def left_unquantised(model: PreTrainedModel, dtype: str) -> Choice | None:
    """How much of the model is in NF4, in percent, where NF4 misses more than LEFT_SHARE of it; else None.

    bitsandbytes quantises torch's own linear layers. Of a mixture of experts transformers may hold all experts of a
    layer in one tensor of three dimensions, some architectures have linear layers of their own kind, and some read a
    layer's weight by themselves: such a model takes several times the memory that one expects of NF4. Counted is what
    reads text, without embeddings and LM head.
    """
    layers = four_bit_layers(model)
    packed = sum(layer.in_features * layer.out_features for layer in layers.values())
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings()]
    others = {id(p) for module in (*layers.values(), *modules) if module is not None for p in module.parameters()}
    text = text_model.text_modules(model)
    parameters = {name: p for name, p in model.named_parameters() if not text or name.startswith(f"{text}.")}
    left = {n: p for n, p in parameters.items() if p.dim() >= 2 and p.is_floating_point() and id(p) not in others}
    count = sum(parameter.numel() for parameter in left.values())
    if count <= LEFT_SHARE * (packed + count):
        return None
    size = sum(parameter.numel() * parameter.element_size() for parameter in left.values())
    reason = (
        f"of the numbers in the layers' matrices {count / (packed + count):.0%} stay in {dtype} ({size / 1e9:.3g} GB, "
        f"{size / count * 2:.0f} times what NF4 would take): {_why_unquantised(model, left)}"
    )
    return Choice(f"{packed / (packed + count):.0%} of the matrices", reason)


def _why_unquantised(model: PreTrainedModel, left: Mapping[str, torch.nn.Parameter]) -> str:
    """In words, by the largest of the parameters that NF4 leaves as they are."""
    name = max(left, key=lambda one: left[one].numel())
    module = name.rpartition(".")[0]
    reason = adaptable_layers.unadaptable(model).get(module)
    if reason:
        return f"{module} {reason}"
    if left[name].dim() >= 3:
        return (
            f"this model holds its experts in tensors of three dimensions, such as {name}, and bitsandbytes quantises "
            "linear layers only"
        )
    kind = type(model.get_submodule(module)).__name__
    return f"{name} is the weight of a {kind}, and bitsandbytes quantises torch's own linear layers only"


def choose_nf4_values(model: PreTrainedModel, dtype: torch.dtype, device: str) -> Choice:
    """Choose whether NF4 weights are dequantised in every matmul or once: the same numbers, memory for time."""
    count = sum(layer.in_features * layer.out_features for layer in four_bit_layers(model).values())
    needed = count * dtype.itemsize
    free = hardware.free_memory(device)
    figures = f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    if device == "cpu" and needed <= DEQUANTISED_SHARE * free:
        return Choice("dequantised once", f"the dequantised values fit ({figures}) and save dequantising in each step")
    why = "they would not leave room for the rest" if device == "cpu" else "on a GPU memory serves larger batches"
    return Choice("dequantised in each product", f"holding the dequantised values would take {figures}; {why}")


def hold_dequantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace each NF4 layer by a frozen linear layer that holds the layer's dequantised values in `dtype`.

    The numbers are those that the NF4 layer computes with, so it is the same QLoRA, without dequantising in each
    forward and backward pass.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in four_bit_layers(model).items():
        weight = dequantize_4bit(layer.weight.data, nf4_state(layer)).to(dtype)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    forget_quantisation(model)


def forget_quantisation(model: torch.nn.Module) -> None:
    """Let libraries treat a quantised model as the ordinary frozen one that it has been made into."""
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")


def parameter_count(model: torch.nn.Module) -> int:
    """How many parameters a model has: an element of an NF4 layer holds several, full or in shards."""
    packed = four_bit_layers(model).values()
    more = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in packed)
    return sum(parameter.numel() for parameter in model.parameters()) + more
