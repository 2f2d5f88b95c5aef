"""What a model's config.json tells: whether it is a causal language model, its context, what attention costs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adder.core.errors import UserError
from adder.core.files import read_json

# What configurations call the number of positions that a model was made for.
NAMES = (
    *("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"),
    *("max_seq_len", "max_seq_length", "context_length"),
)


# Heads of transformers' classes for something else than writing on: ForMaskedLM, ForSequenceClassification, …
OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration|\w*2Text)[A-Z]\w*$")


def refuse_other_than_causal(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError for a config.json of what doesn't predict each token from those before it."""
    names = config.get("architectures") or []
    name = names[0] if names else str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        what = f"{name}, which encodes a text before it writes another"
    elif OTHER_HEAD.search(name):
        what = name
    elif config.get("is_decoder") is False:
        what = f"{name} with is_decoder: false, an encoder"
    else:
        return
    raise UserError(
        f"model.source: {source} is {what}; Adder trains causal language models, which predict each token from those "
        "before it (…ForCausalLM)"
    )


def context_length(model: Path) -> int | None:
    """Positions that the model in this directory was made for; None where its config.json does not tell."""
    return context_of(read_json(model / "config.json"))


def context_of(config: Mapping[str, Any]) -> int | None:
    """The same of what config.json holds."""
    for part in (config, config.get("text_config") or {}):
        for name in NAMES:
            if isinstance(part.get(name), int):
                return part[name]
    return None


def attention_share(config: Mapping[str, Any], lengths: np.ndarray) -> float | None:
    """Share of a pass's multiplications that attention over the tokens takes, for causal examples of these lengths.

    Scores and values take 2 · n²/2 · (heads · head size) multiplications a layer for n tokens; the linear layers take
    one a weight and token (the usual count: Kaplan et al. 2020, arXiv:2001.08361, section 2.1). A gated MLP of the
    Llama kind is assumed. None where the configuration doesn't tell.
    """
    config = config.get("text_config") or config
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    inner, total = config.get("intermediate_size"), int(lengths.sum())
    if not (hidden and heads and inner and total):
        return None
    size = config.get("head_dim") or hidden // heads
    key_value = (config.get("num_key_value_heads") or heads) * size
    weights = 2 * hidden * heads * size + 2 * hidden * key_value + 3 * hidden * inner
    attention = float((lengths.astype(np.float64) ** 2).sum()) / total * heads * size
    return attention / (attention + weights)


def eos_ids(model: Path) -> list[int]:
    """Ids on which a model directory's generation stops: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (model / name).exists():
            found = read_json(model / name).get("eos_token_id")
            if found is not None:
                return found if isinstance(found, list) else [found]
    return []
