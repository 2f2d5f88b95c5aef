"""NEFTune: noise on the embeddings while training, for packs."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adder.training.base_model import bare_model


def add_noise(model: PreTrainedModel | PeftModel, alpha: float) -> None:
    """Add uniform noise of at most alpha / sqrt(tokens * width) to each embedded token of a model in training mode.

    Jain et al. 2023, arXiv:2310.05914, in which `tokens` is the length of the example. transformers' own hook takes the
    length of the full row, which here is a pack, or several: its noise would be smaller the more examples a pass
    holds, and so depend on the machine. The examples of a row are told apart by their `position_ids`, which start at 0.
    """
    bare = bare_model(model)
    position_ids: torch.Tensor | None = None

    def remember(_module: torch.nn.Module, _inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal position_ids
        position_ids = options.get("position_ids")

    def noise(module: torch.nn.Module, _inputs: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        limit = alpha / (lengths(position_ids, embedded) * embedded.shape[-1]).sqrt()
        return embedded + (2 * torch.rand_like(embedded) - 1) * limit[..., None].to(embedded.dtype)

    bare.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    bare.get_input_embeddings().register_forward_hook(noise)


def lengths(position_ids: torch.Tensor | None, embedded: torch.Tensor) -> torch.Tensor:
    """For each token the length of its example, fp32, (rows, tokens); without position_ids a row is one example."""
    rows, tokens = embedded.shape[:2]
    if position_ids is None:
        return torch.full((rows, tokens), float(tokens), device=embedded.device)
    starts = position_ids.expand(rows, tokens).reshape(-1) == 0
    example = starts.cumsum(0)
    return torch.bincount(example)[example].reshape(rows, tokens).float()
