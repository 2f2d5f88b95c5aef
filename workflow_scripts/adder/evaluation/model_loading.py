"""A model as every evaluation loads it, how many replies it writes at once, and what ends them."""

from pathlib import Path
from typing import Any, Literal, Never

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adder.core import hardware, model_config, text_model
from adder.core.choice import Choice
from adder.core.stage_spec import Context
from adder.kernels.trials import decide as trials
from adder.kernels.trials import shapes

# Replies at once, beyond which nothing is gained: a CPU computes no faster, and a GPU's matmuls over so many rows take
# longer than reading the weights.
LARGEST_BATCH = {"cpu": 128, "cuda": 512}
# Positions of a model whose configuration names no number of them, as recurrent ones: more than anything here has.
UNBOUNDED = 2**20
CACHE_SHARE = 0.5  # of the free memory that the KV cache of one batch may take


def load_model(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a model to be evaluated: weights in `dtype`, on `device`."""
    options: dict[str, Any] = {"device_map": device} if device == "cuda" else {}  # straight from the file to the GPU
    model: Any = text_model.load(folder, dtype=getattr(torch, dtype), **options)
    return model.to(device).eval()


def try_kernels(folder: Path, dtype: str, context: Context) -> Choice | None:
    """Let this process use the kernels that a trial on its card found to be right; None on a CPU, which has none."""
    if context.device == "cpu":
        return None
    sizes = shapes.of_config(text_model.read_config(folder), dtype)
    device = f"cuda:{torch.cuda.current_device()}"
    return trials.decide("inference", sizes, device, context.results / trials.FOLDER, context.progress)


def context_length(model: PreTrainedModel) -> int:
    """Positions that a model takes: those of its configuration; of one that names none, more than anything has."""
    config = model.config.get_text_config()
    return getattr(config, model_config.NAMES[0], None) or model_config.context_of(config.to_dict()) or UNBOUNDED


def choose_batch_size(
    wanted: Literal["auto"] | int, model: PreTrainedModel, rows: int, tokens: int
) -> Choice[int, Never]:
    """Replies generated at once: as set, or as many as help and fit, spread evenly. `tokens`: prompt and reply."""
    if wanted != "auto":
        return Choice(wanted, "as set")
    config = model.config.get_text_config()
    all_heads = getattr(config, "num_attention_heads", None) or 1  # recurrent models may have none
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    per_reply = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    fit = int(CACHE_SHARE * hardware.free_memory(model.device.type)) // per_reply
    largest = LARGEST_BATCH[model.device.type]
    most = max(1, min(largest, fit))
    value = -(-rows // -(-rows // most))
    enough = fit >= largest
    why = f"more than {largest} gain nothing" if enough else f"keys and values of {fit} fit in memory"
    return Choice(value, f"{rows} replies in even batches; {why}")


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that end the model's generation by its own configuration, and the one that ends a text for its tokenizer."""
    found: list[Any] = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config):
        own: Any = getattr(config, "eos_token_id", None)
        found += own if isinstance(own, list) else [own]
    return {token for token in found if token is not None}
