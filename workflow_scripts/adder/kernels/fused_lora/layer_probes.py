"""What a model's modules compute, found out by trying: which norm, which activation, what a decoder layer does."""

import sys
from typing import Any

import torch
from transformers import AttentionInterface

from adder.kernels.fused_lora.autograd_functions import FrozenRMSNorm
from adder.kernels.fused_lora.weights import AnyModule, CannotFuse
from adder.kernels.rmsnorm import rms_norm_into_reference
from adder.kernels.swiglu import ACTIVATIONS, activate

# Relative difference to the module replaced that rounding explains, by dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-4}
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
RECORDER = "adder_recorder"
RECORDED = {"query", "key", "value", "mask", "dropout", "change"}
# Tokens that a replacement is compared on.
PROBE_TOKENS = 24


def probe_rmsnorm(module: AnyModule) -> FrozenRMSNorm:
    """Find out by trying which RMSNorm a module is."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.requires_grad or list(module.parameters()) != [weight]:
        raise CannotFuse(f"norm {type(module).__name__}")
    x = sample_normal(4, weight.shape[0]).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = module(x)
        for plus_one in (False, True):
            found = torch.empty_like(x)
            rms_norm_into_reference(x, weight, eps, plus_one, found)
            if records_agree({"": expected}, {"": found}, TOLERANCE[weight.dtype]):
                return FrozenRMSNorm(module, eps, plus_one)
    raise CannotFuse(f"norm {type(module).__name__}")


def probe_activation(mlp: AnyModule) -> str:
    """Find out by trying which activation an MLP has."""
    function = getattr(mlp, "act_fn", None)
    if function is None:
        raise CannotFuse("an MLP without act_fn")
    x = torch.linspace(-6, 6, 101)
    for name in ACTIVATIONS:
        if torch.allclose(function(x), activate(x, name), atol=1e-5):
            return name
    raise CannotFuse(f"activation {type(function).__name__}")


def sample_normal(*shape: int) -> torch.Tensor:
    """Normal values that leave torch's generator, which training draws from, as it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def has_attributes(module: object, *names: str) -> bool:
    """Whether a module has all these attributes."""
    return all(hasattr(module, name) for name in names)


def is_llama_like(layer: AnyModule) -> bool:
    """Whether a decoder layer has the parts of Llama's (queries and keys may have norms), and no others."""
    if set(dict(layer.named_children())) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    home = sys.modules[type(attention).__module__]
    return (
        "forward" not in layer.__dict__
        and has_attributes(attention, *QKV, "o_proj", "head_dim", "attention_dropout", "layer_idx", "config")
        and not set(dict(attention.named_children())) - {*QKV, "o_proj", "q_norm", "k_norm"}
        and hasattr(attention, "q_norm") == hasattr(attention, "k_norm")
        and has_attributes(mlp, *GATE_UP, "down_proj")
        and not set(dict(mlp.named_children())) - {*GATE_UP, "down_proj", "act_fn"}
        and has_attributes(home, "eager_attention_forward", "apply_rotary_pos_emb")
    )


@torch.no_grad()
def record_layer(layer: AnyModule, rotary: AnyModule, hidden: torch.Tensor) -> dict[str, Any]:
    """Run a decoder layer on `hidden`; return all that its attention function was given, and the layer's change."""
    positions = torch.arange(5, 5 + hidden.shape[1], device=hidden.device)[None]
    seen: dict[str, Any] = {}

    def recorder(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """In attention's place: note the arguments, return something that depends on query and value."""
        # What the caller of the layer passes through is no property of the layer.
        own = {name: option for name, option in options.items() if name not in {"use_cache", "position_ids"}}
        seen.update(own, query=query, key=key, value=value, mask=attention_mask)
        mixed = query + value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register(RECORDER, recorder)
    config = layer.self_attn.config
    usual = config._attn_implementation
    config._attn_implementation = RECORDER
    try:
        embeddings = rotary(hidden, position_ids=positions)
        out = layer(hidden, attention_mask=None, position_embeddings=embeddings, position_ids=positions)
        return seen | {"change": out - hidden}
    except Exception as error:  # whatever a layer of another kind makes of such a call
        raise CannotFuse(f"layer {type(layer).__name__} is called in another way") from error
    finally:
        config._attn_implementation = usual


def records_agree(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> bool:
    """Whether two records are equal, tensors within a relative difference of `tolerance`."""
    if a.keys() != b.keys():
        return False
    for name, value in a.items():
        other = b[name]
        if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
            if value is not other and value != other:
                return False
        elif (
            value.shape != other.shape or not (value.float() - other.float()).norm() <= tolerance * value.float().norm()
        ):
            return False
    return True
