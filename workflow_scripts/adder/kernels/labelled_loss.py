"""Cross-entropy and logits at labelled positions only: the LM head never sees the others."""

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from adder.core.labels import IGNORE_INDEX
from adder.core.rng import undisturbed
from adder.kernels import lm_head_loss

# Positions whose logits are computed at once: bounds the memory of the logits to this many rows of the vocabulary.
CHUNK_POSITIONS = 1024
_plain: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just the LM head's output (Gemma caps them, Cohere and Granite scale them).

    Tried once with two tokens: configurations name scales that some models don't apply, and not all that others do.
    """
    if model not in _plain:
        tried = _tries_plain(model)
        _plain[model] = not _names_scale(model) if tried is None else tried
    return _plain[model]


def _tries_plain(model: PreTrainedModel) -> bool | None:
    """Whether the model's own forward gives head(layers' output); None where it can't be tried so."""
    head = _lm_head(model)
    if getattr(model, "sharded_losses", None) is not None or any(p.is_meta for p in model.parameters()):
        return None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    modes = {module: module.training for module in model.modules()}
    ids = torch.tensor([[0, 1]], device=model.device)
    try:
        model.eval()
        with undisturbed(), torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    except Exception:  # a model may want more than tokens
        return None
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if len(seen) != 1 or logits.shape != seen[0][1].shape or hidden.shape != seen[0][0].shape:
        return False
    read, written = seen[0]
    # To the bit: a cap of 30 hardly changes the small logits that two tokens may have. Layers may round otherwise.
    same = torch.equal(logits.float(), written.float())
    return same and torch.allclose(hidden.float(), read.float(), rtol=1e-2, atol=1e-5)


def _names_scale(model: PreTrainedModel) -> bool:
    """Whether the configuration has a scale or cap of logits, under the names that are known."""
    config = model.config.get_text_config()
    names = (
        "final_logit_softcapping",
        "logits_soft_cap",
        "logit_scale",
        "logits_scaling",
        "output_multiplier",
        "lm_head_multiplier",
    )
    return any(getattr(config, name, None) is not None for name in names)


def supports_training(model: PreTrainedModel) -> bool:
    """Whether to train by labelled_losses: a plain head, and on a GPU a frozen one, where no logits are kept.

    TRL's own fused head does the rest: it computes the logits again in the backward pass.
    """
    frozen = not any(parameter.requires_grad for parameter in _lm_head(model).parameters())
    return has_plain_head(model) and (model.device.type == "cpu" or frozen)


def _lm_head(model: PreTrainedModel) -> Any:
    """The model's output embeddings, nearly always a torch.nn.Linear."""
    return model.get_output_embeddings()


def backbone(model: PreTrainedModel) -> Any:
    """The layers below the LM head; Llama 4 gives itself by that name, and holds them by the usual one."""
    inner = model.base_model
    return getattr(model, "model", inner) if inner is model else inner


def labelled_losses(model: PreTrainedModel, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the loss in nats (fp32) at each labelled position, in order, shape (labelled positions,).

    `labels`: (batch, tokens) int64, IGNORE_INDEX where there is no loss; position i is predicted from position i - 1.
    `inputs`: what the model's backbone takes. The cache is off: with it, packed examples would see each other.
    """
    sharded_losses = getattr(model, "sharded_losses", None)
    if sharded_losses is not None:  # which gathers the weights first: see training.distributed.fsdp
        return sharded_losses(labels, **inputs)
    return unsharded_losses(model, labels, **inputs)


def unsharded_losses(model: PreTrainedModel, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """As labelled_losses, from weights that are all here."""
    hidden = backbone(model)(use_cache=False, **inputs).last_hidden_state
    target = labels[:, 1:]
    mask = target != IGNORE_INDEX
    hidden, target = hidden[:, :-1][mask], target[mask]
    head = _lm_head(model)
    hidden = hidden.to(head.weight.dtype)  # some compute the residual stream in fp32, and their own forward does so
    if lm_head_loss.can_fuse(head, hidden):
        return lm_head_loss.frozen_lm_head_losses(hidden, head.weight, head.bias, target)
    parts = [
        torch.nn.functional.cross_entropy(head(h).float(), t, reduction="none")
        for h, t in zip(hidden.split(CHUNK_POSITIONS), target.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def mean_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
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


def labelled_logits(
    model: torch.nn.Module, ids: Sequence[int], labels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one example; return the logits (fp32) that predict its labelled tokens, and those tokens' ids.

    As the model itself computes them, capped or scaled where it does that. Shapes (labelled, vocabulary) and
    (labelled,), on the model's device. A label of IGNORE_INDEX carries no loss; position i is predicted from position
    i - 1. The LM head sees no other position where the model offers that.
    """
    return labelled_logits_of(model, [(ids, labels)])[0]


def labelled_logits_of(
    model: torch.nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same for several examples (ids, labels) in one pass, which can't see one another.

    They lie side by side, the shorter ones filled up behind their end, where no token of a causal model looks.
    """
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in rows)
    batch = torch.zeros(len(rows), longest, dtype=torch.int64)
    target = torch.full((len(rows), longest), IGNORE_INDEX)
    for number, (ids, labels) in enumerate(rows):
        batch[number, : len(ids)] = torch.tensor(ids)
        target[number, : len(labels)] = torch.tensor(labels)
    target = target[:, 1:].to(device)
    carries = target != IGNORE_INDEX
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # of a PEFT model
    kept = torch.arange(longest - 1, device=device)
    options = {}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        kept = torch.nonzero(carries.any(0))[:, 0]
        options["logits_to_keep"] = kept
    logits = model(input_ids=batch.to(device), use_cache=False, **options).logits[:, : len(kept)]
    own = [carry[kept] for carry in carries]
    return [(logits[row][mask].float(), target[row][kept][mask]) for row, mask in enumerate(own)]
