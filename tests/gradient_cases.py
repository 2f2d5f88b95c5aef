"""Batches of packs, and the gradients that a model has of them."""

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.kernels import labelled_loss


def collate(rows: list[dict]) -> dict:
    """Packs to a batch, by TRL's own collator, as training does."""
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def gradients_of(model, batches: list[dict]) -> torch.Tensor:
    """Gradient of the summed loss over `batches`, all trainable parameters in one vector."""
    model.zero_grad()
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    for batch in batches:
        labelled_loss.labelled_losses(bare, **batch).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
