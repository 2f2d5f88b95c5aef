"""Weights in shards, for a model that is too large for one GPU: each rank holds a part of every weight (FSDP2).

A layer's weights are brought together when it computes and let go of after it; gradients and AdamW's moments stay in
shards. Checkpoints and results hold whole weights, so that a training may go on with any number of processes.
"""

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from adder.core import hardware, text_model
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.safetensors_layout import parameter_count
from adder.kernels import labelled_loss
from adder.training import base_model
from adder.training.adaptable_layers import linear_layers
from adder.training.base_model import bare_model, unquantised_modules
from adder.training.distributed import collectives
from adder.training.stage import TrainSettings

# Bytes for each parameter: of a full training its weight, gradient and AdamW's two moments in fp32; of a linear layer
# in NF4 half a byte and, for each 64 weights, a scale of 8 bits. The rest of such a model is as for LoRA.
BYTES_PER_PARAMETER = {"full": 16, "lora": 2, "qlora": 0.5 + 1 / 64}
# Share of a GPU's memory that these may take; the rest is for activations.
MEMORY_SHARE = 0.8


def choose_sharding(
    wanted: Literal["auto", "ddp", "fsdp"], settings: TrainSettings, model: Path, device: str
) -> Choice:
    """Choose "fsdp" (weights in shards) or "ddp" (each GPU has them all); `wanted` is runtime.sharding.

    `model`: the base's folder. Raises UserError for what can't be trained in shards.
    """
    choice = _by_size(wanted, settings.method, model, device)
    if choice.value == "fsdp" and settings.init_lora_weights == "eva":
        raise UserError(
            f"runtime.sharding: 'fsdp' ({choice.reason}) doesn't go with train.init_lora_weights: eva; use another "
            "start"
        )
    return choice


def _by_size(wanted: str, method: str, model: Path, device: str) -> Choice:
    if wanted != "auto":
        return Choice(wanted, "as set by runtime.sharding")
    needed, room = _bytes(model, method), MEMORY_SHARE * hardware.total_memory(device)
    figures = (
        f"weights, gradients and AdamW take {needed / 2**30:,.1f} GiB"
        if method == "full"
        else f"the weights take {needed / 2**30:,.1f} GiB"
    )
    if needed > room:
        return Choice("fsdp", f"{figures}, more than the {room / 2**30:,.1f} of one GPU: in shards")
    return Choice("ddp", f"{figures}, for which each GPU has room")


def _bytes(model: Path, method: str) -> float:
    """Memory for the weights of the model in a folder, and for what training them takes."""
    count = parameter_count(model)
    if method != "qlora":
        return BYTES_PER_PARAMETER[method] * count
    packed = _linear_parameter_count(model)
    return BYTES_PER_PARAMETER["qlora"] * packed + BYTES_PER_PARAMETER["lora"] * (count - packed)


def _linear_parameter_count(model: Path) -> int:
    """Parameter count of the linear layers, the LM head left out: of what bitsandbytes quantises."""
    shape = text_model.without_weights(model)
    left = set(unquantised_modules(shape))
    return sum(layer.weight.numel() for name, layer in linear_layers(shape).items() if name not in left)


def shard(model: PreTrainedModel | PeftModel, device: str) -> None:
    """Shard a model's weights over the ranks, layer by layer, and move it to `device`.

    What an adapter trains stays whole in every rank. The loss has to be computed by `labelled_loss.labelled_losses` or
    by calling the bare model. Raises UserError for an adapted model that scales or caps its LM head.
    """
    adapted = isinstance(model, PeftModel)
    bare = bare_model(model)
    if adapted and not labelled_loss.has_plain_head(bare):
        raise UserError("runtime.sharding: 'fsdp' with LoRA is not for models that scale or cap their logits")
    trained = {parameter for parameter in model.parameters() if adapted and parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    _prepare_packed(bare, device)
    mesh = init_device_mesh(device, (collectives.world_size(),))
    for module in bare.modules():
        if type(module).__name__ in set(bare._no_split_modules or ()):
            fully_shard(module, mesh=mesh, ignored_params=trained)
    # Also what is outside of the layers: what optimizer and checkpoint find between the passes must be the shards.
    fully_shard(bare, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # transformers' generate then keeps the processes in step.
    bare._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType] - a plain attribute
    losses = MethodType(labelled_loss.unsharded_losses, bare)
    bare.sharded_losses = losses  # pyright: ignore[reportArgumentType] - a plain attribute
    register_fsdp_forward_method(bare, "sharded_losses")


def _prepare_packed(model: torch.nn.Module, device: str) -> None:
    """Hold NF4 weights in a form that FSDP2 can shard; the states that unpack them are whole in every rank.

    From a plain parameter and its own state, bitsandbytes' layer makes the weight that it computes with. The bytes are
    called fp32: not every torch can shard integers, and on a GPU torch._foreach_copy_, which FSDP2 gathers by, converts
    16-bit numbers to fp32 and back, which makes one NaN of all.
    """
    layers = base_model.four_bit_layers(model).values()
    for layer in layers:
        layer.quant_state = base_model.nf4_state(layer)
        layer.quant_state.to(device)
        packed = layer.weight.data.flatten().view(torch.float32)
        layer.weight = torch.nn.Parameter(packed[:, None], requires_grad=False)
    if layers:
        base_model.forget_quantisation(model)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether any of a model's weights is in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def trains_shards(model: torch.nn.Module) -> bool:
    """Whether what is trained is in shards."""
    return any(isinstance(parameter, DTensor) and parameter.requires_grad for parameter in model.parameters())


def full_tensors(values: Any) -> Any:
    """Nested containers of tensors with full ones on the CPU instead of shards; to be called in every rank.

    Other ranks than the main one get empty tensors.
    """

    def full(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if collectives.is_main() else tensor.new_empty(0, device="cpu")

    return tree_map(full, values)


def load_parameters(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give a model in shards the values of `state`, by name; to be called in every rank."""
    with torch.no_grad():
        for name, parameter in _sharded_parameters(model):
            parameter.copy_(_sharded_as(parameter, state[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state with full tensors into one whose parameters are in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, own in state["state"].items():
        like = parameters[number]
        for name, value in own.items():
            own[name] = _sharded_as(like, value) if value.shape == like.shape else value
    optimizer.load_state_dict(state)


def _sharded_parameters(model: torch.nn.Module) -> Iterator[tuple[str, DTensor]]:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        yield name, parameter


def _sharded_as(like: DTensor, value: torch.Tensor) -> DTensor:
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
