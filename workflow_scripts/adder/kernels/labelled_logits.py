"""Logits of chosen positions only, as the model itself computes them (capped or scaled, where it does that)."""

import inspect

import torch


def labelled_logits(model: torch.nn.Module, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one example; return the logits (fp32) that predict its labelled tokens, and those tokens' ids.

    Shapes (labelled, vocabulary) and (labelled,), on the model's device. A label of -100 carries no loss; position i is
    predicted from position i - 1. The LM head sees no other position where the model offers that.
    """
    target = torch.tensor(labels, device=model.device)[1:]
    positions = torch.nonzero(target != -100)[:, 0]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    options = {"logits_to_keep": positions} if keeps else {}
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, **options).logits[0]
    return (logits if keeps else logits[positions]).float(), target[positions]
