"""Tiny models of the architectures that are written as GGUF, as the merge stage leaves them."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from adder.core.files import write_json
from tiny import tiny_tokenizer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
TIED = {"tie_word_embeddings": True}
GEMMA3 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, **TIED}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {}),
    "llama untied, with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama with heads of their own size": (LlamaConfig, {"head_dim": 32}),
    "llama 3's rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 with yarn": (Qwen2Config, {"rope_parameters": YARN}),
    # transformers reads no head size out of a qwen3 file and takes 128, which all of Qwen3's models have.
    "qwen3": (Qwen3Config, {"head_dim": 128}),
    "qwen3 with small heads": (Qwen3Config, {"head_dim": 32}),
    "gemma2": (Gemma2Config, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, **CAPS, **TIED}),
    "gemma3": (Gemma3TextConfig, {**GEMMA3, "num_hidden_layers": 7}),
    "gemma3 with linear rope": (Gemma3TextConfig, {**GEMMA3, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}),
    "phi3": (Phi3Config, {"sliding_window": None}),
    "phi3 that rotates a part of each head": (Phi3Config, {"sliding_window": None, "rope_parameters": PARTIAL}),
    "qwen2 moe": (Qwen2MoeConfig, {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3 moe": (Qwen3MoeConfig, {**EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {"num_hidden_layers": 4}),
    "granite": (GraniteConfig, GRANITE),
}


def save(folder: Path, kind=LlamaConfig, tokenizer=None, **changes) -> Path:
    """A model like the merge stage's in `folder`/model; the weights are large enough that attention decides."""
    tokenizer = tokenizer or tiny_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = kind(**{"vocab_size": len(tokenizer), "initializer_range": 0.2, **sizes, **ids, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # which start as ones and zeros
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_json(folder / "model" / "generation_config.json", {"eos_token_id": [ids["eos_token_id"], 0]})
    return folder
