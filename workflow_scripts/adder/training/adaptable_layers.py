"""Which linear layers of a model may have a LoRA pair and be quantised: those that read text and are plainly used."""

import inspect
import re
from collections.abc import Mapping
from functools import cache

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adder.core.text_model import text_modules, tied

# What a mixture of experts is routed by: classes, or last parts of names.
ROUTER_CLASS = re.compile(r"Router|TopKGat|MoEGate|MoeGate|GateLinear")
ROUTER_NAME = re.compile(r"(^|_)(router|gate|gating)$")
NO_TEXT = "isn't part of the layers that read text"
COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def linear_layers(model: torch.nn.Module) -> "dict[str, torch.nn.Linear | Conv1D]":
    """All linear layers by name, GPT-2's Conv1D among them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}


def unadaptable(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers, the LM head apart, that get no pair and aren't quantised, each with the reason."""
    modules = dict(model.named_modules())
    text, head = text_modules(model), model.get_output_embeddings()
    partners = tied(model)
    shared = {*partners, *partners.values()}
    found: dict[str, str] = {}
    for name, layer in linear_layers(model).items():
        if layer is head:
            continue
        reason = _reason(name, modules, text, model)
        if f"{name}.weight" in shared:  # a pair of its own for each could be trained, and not merged into one tensor
            reason = "shares its weight with another layer"
        if reason:
            found[name] = reason
    return found


def adaptable(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that may get a pair, in the model's order."""
    left, head = unadaptable(model), model.get_output_embeddings()
    return [name for name, layer in linear_layers(model).items() if layer is not head and name not in left]


def targets(model: PreTrainedModel, names: list[str]) -> list[str]:
    """What PEFT is to be told so that it takes `names` and no other module: last parts where those are enough.

    A last part may be a number, which decoder layers have as well.
    """
    others = {name.rpartition(".")[2] for name in dict(model.named_modules()).keys() - set(names)}
    return sorted({name if name.rpartition(".")[2] in others else name.rpartition(".")[2] for name in names})


def _reason(name: str, modules: Mapping[str, torch.nn.Module], text: str, model: PreTrainedModel) -> str | None:
    parent_name, _, last = name.rpartition(".")
    parent = modules[parent_name]
    if text and not name.startswith(f"{text}."):
        return NO_TEXT
    if _is_router(name, modules, model):
        return "routes tokens to experts"
    if last in _read_directly(type(parent)) and getattr(model.config, "slow_but_exact", True):
        return f"has its weight read directly by {type(parent).__name__}, which a pair would not change"
    return None


def _is_router(name: str, modules: Mapping[str, torch.nn.Module], model: PreTrainedModel) -> bool:
    parent_name, _, last = name.rpartition(".")
    parts = name.split(".")
    around = (modules[".".join(parts[:end])] for end in range(1, len(parts) + 1))
    if ROUTER_NAME.search(last) or any(ROUTER_CLASS.search(type(module).__name__) for module in around):
        return True
    if not hasattr(modules[parent_name], "experts"):
        return False
    config = model.config.get_text_config()
    counts = {1, *(getattr(config, key, None) for key in COUNTS_OF_EXPERTS)}
    layer = modules[name]
    return isinstance(layer, torch.nn.Linear) and layer.out_features in counts


@cache
def _read_directly(kind: type) -> frozenset[str]:
    """Attributes of which the code of a class reads `.weight` by itself, as kernels of state-space models do.

    Bloom has such code too, and says by `slow_but_exact` of its configuration whether it is run.
    """
    found: set[str] = set()
    for one in kind.__mro__:
        if not one.__module__.startswith("transformers."):
            continue
        try:
            source = inspect.getsource(one)
        except (OSError, TypeError):
            continue
        found |= set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|is_\w+)\b)", source))
    return frozenset(found)
