"""The loss of each held-out row by itself, rows of like lengths in one padded batch."""

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.evaluation.model_loading import context_length
from adder.kernels.labelled_loss import has_plain_head, labelled_logits, labelled_losses

LOSS_TOKENS = 4096  # positions of one batch, padding included


class LabelledRow(Protocol):
    """Token ids, and at each the label: the id, or IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]


@torch.inference_mode()
def row_losses(model: PreTrainedModel, rows: Sequence[LabelledRow], progress: Progress) -> list[torch.Tensor]:
    """Loss in nats at each labelled position of each row, fp64 on the CPU; a row longer than the context is cut."""
    context = context_length(model)
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].input_ids), index))
    losses: list[torch.Tensor] = [torch.zeros(0)] * len(rows)
    done = 0
    plain = has_plain_head(model)
    for batch in loss_batches(order, rows, context) if plain else [[index] for index in order]:
        examples = [(rows[index].input_ids[:context], rows[index].labels[:context]) for index in batch]
        found = padded_losses(model, examples) if plain else [own_head_losses(model, *examples[0])]
        for index, values in zip(batch, found, strict=True):
            losses[index] = values.double().cpu()
        done += len(batch)
        progress.line(f"loss: {done:,} of {len(rows):,} rows", last=done == len(rows))
    return losses


def loss_batches(order: Sequence[int], rows: Sequence[LabelledRow], context: int) -> list[list[int]]:
    """Rows, longest first, in batches of at most LOSS_TOKENS positions: neighbours are alike, so little is padding."""
    batches: list[list[int]] = []
    for index in order:
        width = min(len(rows[batches[-1][0]].input_ids), context) if batches else 0
        if not batches or (len(batches[-1]) + 1) * width > LOSS_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def padded_losses(model: PreTrainedModel, examples: Sequence[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Losses of several examples (ids, labels) in one padded batch; the LM head sees labelled positions only."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for number, (own_ids, own_labels) in enumerate(examples):
        ids[number, : len(own_ids)] = torch.tensor(own_ids)
        labels[number, : len(own_ids)] = torch.tensor(own_labels)
        mask[number, : len(own_ids)] = 1
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    device = model.device
    losses = labelled_losses(model, labels.to(device), input_ids=ids.to(device), attention_mask=mask.to(device))
    return list(losses.split(counts))


def own_head_losses(model: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
    """Losses of one example for models that scale or cap the LM head's output: from the model's own logits."""
    logits, target = labelled_logits(model, ids, labels)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")
