"""Tiny random checkpoints of models that see as well as read, as they are published: names on disk are their own."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from architectures import DELTA_RULE, EXPERTS, SHAPE

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "embed_dim": 32,
}
# Thirds of a head's frequencies, for time, height and width.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
# model_type: what its text part and its tower need beside SHAPE and TOWER.
VISION_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"query_pre_attn_scalar": 8, "sliding_window": 16}, {}),
    "qwen3_5": (DELTA_RULE, {}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral"}),
    "qwen2_vl": ({"rope_parameters": MROPE}, {}),
    "qwen2_5_vl": ({"rope_parameters": MROPE}, {}),
    "qwen3_vl": ({}, {}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "llama4": ({**EXPERTS, "intermediate_size_mlp": 48}, {}),
}


def save_vision_model(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save one with weights large enough for each part to show."""
    text, tower = VISION_MODELS[name]
    config = AutoConfig.for_model(name, text_config={**SHAPE, **text}, vision_config={**TOWER, **tower})
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder
