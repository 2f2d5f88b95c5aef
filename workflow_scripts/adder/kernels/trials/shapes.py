"""The sizes of a model that kernels are tried with."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

# How configurations call it.
GELU_TANH = {"gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_pytorch_tanh_python"}


@dataclass(frozen=True)
class ModelShapes:
    """What of a model and its training decides which kernels are compiled, and for what sizes.

    dtype: of the matmuls. rank, dropout: LoRA's, rank 0 without. intermediate: width of the MLP. cap: of attention
    scores; window: tokens that a layer attends to. four_bit: whether weights are in NF4. fp8: whether matmuls in fp8
    are asked for.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    dtype: str = "bfloat16"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    cap: float | None = None
    window: int | None = None
    attention_dropout: float = 0.0
    value_size: int | None = None
    rank: int = 0
    dropout: float = 0.0
    four_bit: bool = False
    fp8: bool = False


def head_size(config: PreTrainedConfig) -> int:
    """Of queries and keys; latent attention (DeepSeek's) joins parts with and without positions."""
    without, rotated = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    if without and rotated:
        return without + rotated
    return getattr(config, "head_dim", None) or config.hidden_size // _size(config, "num_attention_heads", 1)


def of_config(config: PreTrainedConfig, dtype: str, **training: Any) -> ModelShapes:
    """Read the shapes of a model's configuration (of its text part); `training`: rank, dropout, four_bit, fp8."""
    text = config.get_text_config()
    hidden, heads = _size(text, "hidden_size", 1), _size(text, "num_attention_heads", 1)
    return ModelShapes(
        hidden=hidden,
        intermediate=_size(text, "intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=_size(text, "num_key_value_heads", heads),
        head_size=head_size(text),
        vocabulary=_size(text, "vocab_size", 1),
        dtype=dtype,
        activation="gelu_tanh" if _activation(text) in GELU_TANH else "silu",
        cap=getattr(text, "attn_logit_softcapping", None),
        window=getattr(text, "sliding_window", None),
        attention_dropout=getattr(text, "attention_dropout", 0.0) or 0.0,
        value_size=getattr(text, "v_head_dim", None),
        **training,
    )


def _size(config: PreTrainedConfig, name: str, default: int) -> int:
    """A size by its name, `default` where the model has none, the largest of one that a few list by layer."""
    value = getattr(config, name, None)
    return max(value) if isinstance(value, list | tuple) else int(value or default)


def _activation(config: PreTrainedConfig) -> str | None:
    """Gemma's has a name of its own."""
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
