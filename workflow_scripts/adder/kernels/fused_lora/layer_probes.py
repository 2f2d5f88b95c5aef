"""What a model's modules compute, found out by trying: which norm, which activation, what a decoder layer does."""

import sys

import torch
from transformers import AttentionInterface

from adder.kernels.fused_lora.autograd_functions import Norm
from adder.kernels.fused_lora.weights import Unfit
from adder.kernels.rmsnorm import rms_norm_into_reference
from adder.kernels.swiglu import ACTIVATIONS, activate

# Relative difference to the module replaced that rounding explains, by dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-4}
ATTENTION = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
RECORDER = "adder_recorder"
RECORDED = {"query", "key", "value", "mask", "dropout", "change"}
# Tokens that a replacement is compared on.
PROBE_TOKENS = 24


def norm_of(module: torch.nn.Module) -> Norm:
    """Find out by trying which RMSNorm a module is."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.requires_grad or list(module.parameters()) != [weight]:
        raise Unfit(f"norm {type(module).__name__}")
    x = sample(4, weight.shape[0]).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = module(x)
        for plus_one in (False, True):
            found = torch.empty_like(x)
            rms_norm_into_reference(x, weight, eps, plus_one, found)
            if agree({"": expected}, {"": found}, TOLERANCE[weight.dtype]):
                return Norm(module, eps, plus_one)
    raise Unfit(f"norm {type(module).__name__}")


def activation_of(mlp: torch.nn.Module) -> str:
    """Find out by trying which activation an MLP has."""
    function = getattr(mlp, "act_fn", None)
    if function is None:
        raise Unfit("an MLP without act_fn")
    x = torch.linspace(-6, 6, 101)
    for name in ACTIVATIONS:
        if torch.allclose(function(x), activate(x, name), atol=1e-5):
            return name
    raise Unfit(f"activation {type(function).__name__}")


def sample(*shape: int) -> torch.Tensor:
    """Normal numbers that leave torch's generator, which training draws from, as it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def has(module: torch.nn.Module, *names: str) -> bool:
    """Whether a module has all these attributes."""
    return all(hasattr(module, name) for name in names)


def like_llama(layer: torch.nn.Module) -> bool:
    """Whether a decoder layer has the parts of Llama's (queries and keys may have norms), and no others."""
    if set(dict(layer.named_children())) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    home = sys.modules[type(attention).__module__]
    return (
        "forward" not in layer.__dict__
        and has(attention, *ATTENTION, "o_proj", "head_dim", "attention_dropout", "layer_idx", "config")
        and not set(dict(attention.named_children())) - {*ATTENTION, "o_proj", "q_norm", "k_norm"}
        and hasattr(attention, "q_norm") == hasattr(attention, "k_norm")
        and has(mlp, *GATED, "down_proj")
        and not set(dict(mlp.named_children())) - {*GATED, "down_proj", "act_fn"}
        and has(home, "eager_attention_forward", "apply_rotary_pos_emb")
    )


@torch.no_grad()
def record(layer: torch.nn.Module, rotary: torch.nn.Module, hidden: torch.Tensor) -> dict:
    """Run a decoder layer on `hidden`; return all that its attention function was given, and the layer's change."""
    positions = torch.arange(5, 5 + hidden.shape[1], device=hidden.device)[None]
    seen = {}

    def recorder(module, query, key, value, attention_mask, **options):
        """In attention's place: note the arguments, return something that depends on query and value."""
        # What the caller of the layer passes through is no property of the layer.
        options = {name: option for name, option in options.items() if name not in {"use_cache", "position_ids"}}
        seen.update(options, query=query, key=key, value=value, mask=attention_mask)
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
        raise Unfit(f"layer {type(layer).__name__} is called in another way") from error
    finally:
        config._attn_implementation = usual


def agree(a: dict, b: dict, tolerance: float) -> bool:
    """Whether two records are equal, tensors within a relative difference of `tolerance`."""
    if a.keys() != b.keys():
        return False
    for name, value in a.items():
        other = b[name]
        if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
            if value is not other and value != other:
                return False
        elif value.shape != other.shape:
            return False
        elif not (value.float() - other.float()).norm() <= tolerance * value.float().norm():
            return False
    return True
