"""Which models can be written as GGUF, by their config.json. Light to import: the workflow is parsed with it."""

from typing import Any

from adder.core.errors import UserError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
# Settings of YaRN that are llama.cpp's own defaults; others would need keys that not every reader of GGUF knows.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}


def refuse_unsupported(config: dict[str, Any]) -> str:
    """llama.cpp's name of the architecture of a config.json. Raises UserError with the reason for any other model."""
    names = config.get("architectures") or [str(config.get("model_type"))]
    if names[0] not in ARCHITECTURES:
        raise refused(f"its architecture is {names[0]}; can be: {', '.join(ARCHITECTURES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise refused(f"its layers use {config['hidden_act']}, llama.cpp's use silu")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise refused(f"its position embedding is scaled by {kind!r}; can be: {', '.join(ROPE_TYPES)}")
    odd = [name for name, usual in YARN_DEFAULTS.items() if rope.get(name, usual) not in (usual, None)]
    if kind == "yarn" and odd:
        raise refused(f"its YaRN scaling has {odd[0]}: {rope[odd[0]]}; only the usual {YARN_DEFAULTS[odd[0]]} can be")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused("only a part of each head is rotated by position")
    return ARCHITECTURES[names[0]]


def refused(reason: str) -> UserError:
    """The error for a model that llama.cpp's format has no words for."""
    return UserError(f"export.gguf: this model can't be written as GGUF: {reason}")
