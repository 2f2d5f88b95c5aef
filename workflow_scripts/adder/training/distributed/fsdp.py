"""Weights in shards, for a model that is too large for one GPU: each process holds a part of every weight (FSDP2).

A layer's weights are brought together when it computes and let go of after it; gradients and AdamW's moments stay in
shards. Checkpoints and results hold whole weights, so that a training may go on with any number of processes.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adder.core import hardware
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.safetensors_layout import parameter_count
from adder.kernels import labelled_loss
from adder.training import base_model
from adder.training.distributed import collectives

# Bytes for each of the model's numbers: of a full training its weight, gradient and AdamW's two moments in fp32; of a
# linear layer in NF4 half a byte and, for each 64 numbers, a scale of 8 bits. The rest of such a model is as for LoRA.
BYTES = {"full": 16, "lora": 2, "qlora": 0.5 + 1 / 64}
# Share of a GPU's memory that these may take; the rest is for activations.
SHARE = 0.8


def choose(wanted: str, settings: dict, model: Path, device: str) -> Choice:
    """Choose "fsdp" (weights in shards) or "ddp" (each GPU has them all); `wanted` is runtime.sharding.

    `settings`: those of training. `model`: the base's folder. Raises UserError for what can't be trained in shards.
    """
    choice = _chosen(wanted, settings["method"], model, device)
    if choice.value == "fsdp" and settings["init_lora_weights"] == "eva":
        raise UserError(
            f"runtime.sharding: 'fsdp' ({choice.reason}) doesn't go with train.init_lora_weights: eva; use another "
            "start"
        )
    return choice


def _chosen(wanted: str, method: str, model: Path, device: str) -> Choice:
    if wanted != "auto":
        return Choice(wanted, "as set by runtime.sharding")
    needed, room = _bytes(model, method), SHARE * hardware.total_memory(device)
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
    numbers = parameter_count(model)
    if method != "qlora":
        return BYTES[method] * numbers
    packed = _linear_numbers(model)
    return BYTES["qlora"] * packed + BYTES["lora"] * (numbers - packed)


def _linear_numbers(model: Path) -> int:
    """How many numbers the linear layers hold, the LM head left out: what bitsandbytes quantises."""
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = [module for module in shape.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return sum(layer.weight.numel() for layer in layers if layer is not shape.get_output_embeddings())


def shard(model: torch.nn.Module, device: str) -> None:
    """Shard a model's weights over the processes, layer by layer, and move it to `device`.

    What an adapter trains stays whole in every process. The loss has to be computed by `loss.labelled_losses` or by
    calling the bare model. Raises UserError for an adapted model that scales or caps its LM head.
    """
    adapted = isinstance(model, PeftModel)
    bare = model.get_base_model() if adapted else model
    if adapted and not labelled_loss.has_plain_head(bare):
        raise UserError("runtime.sharding: 'fsdp' with LoRA is not for models that scale or cap their logits")
    trained = {parameter for parameter in model.parameters() if adapted and parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    _prepare_packed(bare, device)
    options = {"mesh": init_device_mesh(device, (collectives.count(),)), "ignored_params": trained}
    for module in bare.modules():
        if type(module).__name__ in bare._no_split_modules:
            fully_shard(module, **options)
    # Also what is outside of the layers: what optimizer and checkpoint find between the passes must be the shards.
    fully_shard(bare, reshard_after_forward=True, **options)
    bare._is_fsdp_managed_module = True  # transformers' generate then keeps the processes in step
    bare.sharded_losses = MethodType(labelled_loss.unsharded_losses, bare)
    register_fsdp_forward_method(bare, "sharded_losses")


def _prepare_packed(model: torch.nn.Module, device: str) -> None:
    """Hold NF4 weights in a form that FSDP2 can shard; the states that unpack them are whole in every process.

    From a plain parameter and its own state, bitsandbytes' layer makes the weight that it computes with. The bytes are
    called fp32: not every torch can shard integers, and on a GPU torch._foreach_copy_, which FSDP2 gathers by, converts
    16-bit numbers to fp32 and back, which makes one NaN of all.
    """
    layers = base_model.four_bit_layers(model).values()
    for layer in layers:
        layer.quant_state = layer.weight.quant_state
        layer.quant_state.to(device)
        packed = layer.weight.data.flatten().view(torch.float32)
        layer.weight = torch.nn.Parameter(packed[:, None], requires_grad=False)
    if layers:
        base_model.forget_quantisation(model)


def in_shards(model: torch.nn.Module) -> bool:
    """Whether any of a model's weights is in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def trains_shards(model: torch.nn.Module) -> bool:
    """Whether what is trained is in shards."""
    return any(isinstance(parameter, DTensor) and parameter.requires_grad for parameter in model.parameters())


def whole(values: Any) -> Any:
    """Nested containers of tensors with whole ones on the CPU instead of shards; to be called in every process.

    Other processes than the main one get empty tensors.
    """

    def of(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if collectives.is_main() else full.new_empty(0, device="cpu")

    return tree_map(of, values)


def put(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give a model in shards the values of `state`, by name; to be called in every process."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_as(parameter, state[name]))


def put_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state with whole tensors into one whose parameters are in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, own in state["state"].items():
        like = parameters[number]
        for name, value in own.items():
            own[name] = _as(like, value) if value.shape == like.shape else value
    optimizer.load_state_dict(state)


def _as(like: DTensor, value: torch.Tensor) -> DTensor:
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
