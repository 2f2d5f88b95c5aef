"""Cross-entropy over labelled positions only: the LM head never sees the others."""

import torch
from transformers import PreTrainedModel

from adder.kernels import lm_head_loss

# Positions whose logits are computed at once: bounds the memory of the logits to this many rows of the vocabulary.
CHUNK = 1024


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just the LM head's output (Gemma caps them, Cohere and Granite scale them)."""
    config = model.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return all(getattr(config, name, None) is None for name in names)


def serves_training(model: PreTrainedModel) -> bool:
    """Whether to train by labelled_losses: a plain head, and on a GPU a frozen one, where no logits are kept.

    TRL's own fused head does the rest: it computes the logits again in the backward pass.
    """
    frozen = not any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())
    return has_plain_head(model) and (model.device.type == "cpu" or frozen)


def labelled_losses(model: PreTrainedModel, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the loss in nats (fp32) at each labelled position, in order, shape (labelled positions,).

    `labels`: (batch, tokens) int64, -100 where there is no loss; position i is predicted from position i - 1.
    `inputs`: what the model's backbone takes. The cache is off: with it, packed examples would see each other.
    """
    if hasattr(model, "sharded_losses"):  # which bring the weights together first: see sharding.shard
        return model.sharded_losses(labels, **inputs)
    return own_losses(model, labels, **inputs)


def own_losses(model: PreTrainedModel, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """As labelled_losses, from weights that are whole."""
    hidden = model.base_model(use_cache=False, **inputs).last_hidden_state
    target = labels[:, 1:]
    mask = target != -100
    hidden, target = hidden[:, :-1][mask], target[mask]
    head = model.get_output_embeddings()
    if lm_head_loss.can_fuse(head, hidden):
        return lm_head_loss.frozen_lm_head_losses(hidden, head.weight, head.bias, target)
    parts = [
        torch.nn.functional.cross_entropy(head(h).float(), t, reduction="none")
        for h, t in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def mean_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Mean loss (nats) over the labelled positions of `batch`, by the model's own forward where its head is not plain.

    model: the bare one. batch: what labelled_losses takes.
    """
    if has_plain_head(model):
        return labelled_losses(model, **batch).mean()
    return model(**batch, use_cache=False).loss


def dft(losses: torch.Tensor) -> torch.Tensor:
    """Weight each token's loss by the probability that the model gives the token, held constant for the gradient.

    Dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629), as TRL's `loss_type="dft"`. `losses`: nats a token.
    """
    return losses * torch.exp(-losses.detach())
