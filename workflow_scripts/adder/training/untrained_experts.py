"""How much of a mixture of experts a LoRA training leaves as it is: its experts, where they are held in one tensor."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from adder.core.choice import Choice
from adder.training.base_model import bare_model, four_bit_layers

# Share of the layers' numbers that may go without a pair without a word.
LEFT_SHARE = 0.02


def left_untrained(model: PeftModel) -> Choice | None:
    """Share of the layers' matrices that have LoRA pairs, where experts have none; None where no expert goes without.

    Counted in numbers of the base's weights, an NF4 weight's all, embeddings and LM head left out. PEFT puts pairs on
    linear layers; experts that transformers holds in one tensor of three dimensions are none.
    """
    bare = bare_model(model)
    ends = [module for module in (bare.get_input_embeddings(), bare.get_output_embeddings()) if module is not None]
    outside = {id(parameter) for module in ends for parameter in module.parameters()}
    packed = {id(layer.weight): layer.in_features * layer.out_features for layer in four_bit_layers(model).values()}
    adapted = {
        id(p) for m in bare.modules() if isinstance(m, LoraLayer) for p in m.get_base_layer().parameters(recurse=False)
    }
    whole, paired = 0, 0
    joined: dict[str, int] = {}
    for name, parameter in bare.named_parameters():
        if ".lora_" in name or "modules_to_save" in name or parameter.ndim < 2 or id(parameter) in outside:
            continue
        count = packed.get(id(parameter), parameter.numel())
        whole += count
        if id(parameter) in adapted or parameter.requires_grad:
            paired += count
        elif _is_experts(parameter):
            joined[name.replace(".base_layer.", ".")] = count
    share = sum(joined.values()) / whole if whole else 0.0
    if share <= LEFT_SHARE:
        return None
    reason = (
        f"the experts, {share:.0%} of the numbers in the layers' matrices, get no LoRA pairs and stay as they are: "
        f"this model holds them in tensors of three dimensions, as {next(iter(joined))}, and pairs go on linear layers"
    )
    return Choice(f"{paired / whole:.0%} of the matrices", reason)


def _is_experts(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is the same matrix of several experts; a convolution of a few taps is none."""
    return parameter.ndim == 3 and parameter.is_floating_point() and min(parameter.shape[1:]) > 8
