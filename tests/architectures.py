"""Tiny random models of many architectures, each by its own class in transformers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adder.training import base_model

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
DELTA_RULE = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# model_type: what its configuration needs beside SHAPE to be tiny, and to show what it is made of.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 4,
        "sliding_window": 16,
    },
    "phi": {},
    "phimoe": EXPERTS,
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 48},
    "gpt_bigcode": {},
    "seed_oss": {},
    "olmoe": EXPERTS,
    "cohere2": {"sliding_window": 16},
    "minicpm3": LATENT,
    "phi3": {"sliding_window": None},
    "smollm3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0},
    "cohere": {},
    "glm4": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 16},
    "falcon": {"alibi": False},
    "stablelm": {},
    "nemotron": {},
    "jamba": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "minimax": {**EXPERTS, "block_size": 16},
    "recurrent_gemma": {"logits_soft_cap": 1.0, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "zaya": {},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "gpt_neox_japanese": {},
    "qwen3_next": {**EXPERTS, **DELTA_RULE, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA_RULE,
    "olmo_hybrid": DELTA_RULE,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA2, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "kimi_linear": {
        **LATENT,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_shared_experts": 1,
    },
    "mpt": {},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "granitemoe_swa": EXPERTS,
    "mimo_v2_flash": EXPERTS,
    "gpt_oss": {**EXPERTS, "sliding_window": 16},
}
WITHOUT_HEAD_DIM = ("falcon",)  # which works it out


def tiny_architecture(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any
) -> PreTrainedModel:
    """A tiny model with weights large enough for each part to show, with the attention that training loads it with."""
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim" or name not in WITHOUT_HEAD_DIM}
    config = AutoConfig.for_model(name, **{**shape, **ARCHITECTURES[name], **changes})
    base_model.name_head_cap(config)
    attention = base_model.choose_attention(config, str(dtype).removeprefix("torch."), device)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.value)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.config.use_cache = False
    return model.to(device, dtype)


# What the check before training settles for each, by why; docs/models.md has it as a table.
AT_ONCE = (
    "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text gemma3n_text phi phi3 phimoe llama4_text "
    "smollm3 olmo2 olmoe granite cohere cohere2 glm4 seed_oss gpt_neox gpt_neox_japanese gpt2 gpt_bigcode gptj gpt_neo "
    "opt deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3"
).split()
ONE_AT_A_TIME = {
    "its layers don't pass on where an example begins": "stablelm nemotron".split(),
    "its recurrent states run on into the next example": (
        "jamba minimax recurrent_gemma zaya mamba falcon_mamba lfm3".split()
    ),
    "it refuses packs without `causal-conv1d` or `flash-linear-attention`": (
        "qwen3_next qwen3_5_text olmo_hybrid lfm2 bamba granitemoehybrid nemotron_h falcon_h1 kimi_linear".split()
    ),
    "its own attention, which no other can take the place of, knows no packs": "bloom xglm mpt falcon".split(),
    "it has attention sinks, which attention over packs can't compute here": (
        "gpt_oss granitemoe_swa mimo_v2_flash".split()
    ),
}
APART = [name for names in ONE_AT_A_TIME.values() for name in names]


def table() -> str:
    """The rows of docs/models.md: architecture, how its packs are computed, and why."""
    rows = [(", ".join(f"`{name}`" for name in AT_ONCE), "right, computed at once", "")]
    rows += [
        (", ".join(f"`{n}`" for n in names), "right, one example at a time", why)
        for why, names in ONE_AT_A_TIME.items()
    ]
    rows.append(
        ("`bert`, `roberta` and other encoders", "refused", "a token's loss changes when tokens behind it do"),
    )
    rows.append(
        (
            "`modernbert-decoder`",
            "refused",
            "its LM head has more to it than a matrix, and training would leave that out",
        )
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
