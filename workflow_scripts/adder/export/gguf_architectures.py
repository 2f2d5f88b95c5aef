"""Which models can be written as GGUF, by their config.json. Light to import: the workflow is parsed with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adder.core.errors import UserError

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
# Settings of YaRN that are llama.cpp's own defaults; others would need keys that not every reader of GGUF knows.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp has compiled in for models of a kind, which a config.json must agree with.

    name: llama.cpp's. activation: of the MLP. rope_types: how the position embedding may be scaled. reorders_heads: it
    rotates neighbouring rows of a query's or key's head, transformers rows that are half a head apart. norm_offset: is
    added to the weights of norms. windows: it has the model's sliding windows. partial_rotation: part of a head may be
    left unrotated. differs: a reason why a config.json isn't this model after all, or None.
    """

    name: str
    activation: str = "silu"
    rope_types: tuple[str, ...] = ROPE_TYPES
    reorders_heads: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    partial_rotation: bool = False
    differs: Callable[[Config], str | None] = lambda config: None


def refuse_unsupported(config: Config) -> Architecture:
    """llama.cpp's architecture for a config.json. Raises UserError with the reason for any other model."""
    names = config.get("architectures") or [str(config.get("model_type"))]
    if names[0] not in ARCHITECTURES:
        raise refused(f"its architecture is {names[0]}; can be: {', '.join(ARCHITECTURES)}")
    found, config = ARCHITECTURES[names[0]], config.get("text_config") or config
    activation = config.get("hidden_activation") or config.get("hidden_act") or found.activation
    if activation != found.activation:
        raise refused(f"its layers use {activation}, llama.cpp's use {found.activation}")
    rope = rope_settings(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in found.rope_types:
        raise refused(f"its position embedding is scaled by {kind!r}; can be: {', '.join(found.rope_types)}")
    odd = [name for name, usual in YARN_DEFAULTS.items() if rope.get(name, usual) not in (usual, None)]
    if kind == "yarn" and odd:
        raise refused(f"its YaRN scaling has {odd[0]}: {rope[odd[0]]}; only the usual {YARN_DEFAULTS[odd[0]]} can be")
    if not found.partial_rotation and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused("only a part of each head is rotated by position")
    reason = found.differs(config)
    if reason:
        raise refused(reason)
    return found


def rope_settings(config: Config) -> dict[str, Any]:
    """Settings of the position embedding, where kinds of layers differ those of full attention."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("full_attention") or rope


def refused(reason: str) -> UserError:
    """The error for a model that llama.cpp's format has no words for."""
    return UserError(f"export.gguf: this model can't be written as GGUF: {reason}")


def _layers(config: Config, every: int) -> str | None:
    """llama.cpp takes each `every`th layer for one that sees the whole context, the others for sliding windows."""
    count = config["num_hidden_layers"]
    kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(count)]
    if (config.get("layer_types") or kinds) != kinds or config.get("sliding_window_pattern", every) != every:
        return f"its layers with sliding windows aren't all but each {every}th, as llama.cpp has them"
    return None


def _query_scale(config: Config, layers_of_27b: int) -> str | None:
    """llama.cpp scales by a head's size, in the model of 27 B by the width that each head has of the hidden size."""
    width = config.get("head_dim", 256)
    if config["num_hidden_layers"] == layers_of_27b:
        width = config["hidden_size"] // config["num_attention_heads"]
    scalar = config.get("query_pre_attn_scalar", 256)
    return None if scalar == width else f"its attention is scaled by query_pre_attn_scalar {scalar}, not {width}"


def _gemma2(config: Config) -> str | None:
    return _layers(config, 2) or _query_scale(config, 46)


def _gemma3(config: Config) -> str | None:
    rope = config.get("rope_parameters") or {}
    local = (rope.get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq", 10_000.0))
    if local != 10_000.0:
        return f"the position embedding of its sliding windows has the base {local:g}, llama.cpp's 10,000"
    capped = [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if config.get(name)]
    if capped:
        return f"it has {capped[0]}, which llama.cpp's gemma3 hasn't"
    return _layers(config, 6) or _query_scale(config, 62)


def _every_layer_has_experts(config: Config) -> str | None:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        return "some of its layers have no experts"
    return None


def _qwen2_moe(config: Config) -> str | None:
    if config.get("norm_topk_prob", False):
        return "its router's weights are normed (norm_topk_prob), llama.cpp's qwen2moe's aren't"
    return _every_layer_has_experts(config)


def _qwen3_moe(config: Config) -> str | None:
    if not config.get("norm_topk_prob", False):
        return "its router's weights aren't normed (norm_topk_prob), llama.cpp's qwen3moe's are"
    return _every_layer_has_experts(config)


def _smollm3(config: Config) -> str | None:
    count = config["num_hidden_layers"]
    rotated = [int((layer + 1) % 4 != 0) for layer in range(count)]
    if (config.get("no_rope_layers") or rotated) != rotated or config.get("no_rope_layer_interval", 4) != 4:
        return "its layers without a position embedding aren't each 4th, as llama.cpp has them"
    return "it has sliding windows" if config.get("use_sliding_window") else None


GEMMA2 = Architecture("gemma2", "gelu_pytorch_tanh", ("default",), norm_offset=1.0, windows=True, differs=_gemma2)
GEMMA3 = Architecture(
    "gemma3", "gelu_pytorch_tanh", ("default", "linear"), norm_offset=1.0, windows=True, differs=_gemma3
)
# By what config.json calls the architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", reorders_heads=True),
    "MistralForCausalLM": Architecture("llama", reorders_heads=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe", differs=_qwen2_moe),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", differs=_qwen3_moe),
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Phi3ForCausalLM": Architecture("phi3", rope_types=("default",), partial_rotation=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "SmolLM3ForCausalLM": Architecture("smollm3", reorders_heads=True, differs=_smollm3),
    "GraniteForCausalLM": Architecture("granite", reorders_heads=True),
}
