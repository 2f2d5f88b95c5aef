"""Examples of a pack through the layers one by one: what each gives alone, in order, whatever the model passes on."""

import torch

from adder.kernels.labelled_loss import labelled_losses
from adder.kernels.one_at_a_time import compute_one_at_a_time
from architectures import tiny_architecture
from fused_lora_cases import batch_of

LENGTHS = (9, 23, 14)


def batch() -> dict:
    made = batch_of(*LENGTHS)
    return made | {"input_ids": made["input_ids"] % 128, "labels": made["labels"].where(made["labels"] < 0, 5)}


def test_losses_of_a_pack_are_those_of_its_examples():
    model = tiny_architecture("jamba").eval()
    pack = batch()
    rows = zip(pack["input_ids"].split(LENGTHS, 1), pack["labels"].split(LENGTHS, 1), strict=True)
    expected = torch.cat([labelled_losses(model, labels, input_ids=ids) for ids, labels in rows])
    compute_one_at_a_time(model)
    assert torch.equal(labelled_losses(model, **pack), expected)


def test_boundaries_that_the_models_own_forward_refuses_reach_the_backbone():
    model = tiny_architecture("bloom").eval()
    pack = batch()
    expected = torch.cat([model(input_ids=ids).logits for ids in pack["input_ids"].split(LENGTHS, 1)], dim=1)
    compute_one_at_a_time(model)
    assert torch.equal(model(**pack).logits, expected)


def test_padded_batches_stay_as_they_are_also_after_a_pack():
    model = tiny_architecture("llama").eval()
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    compute_one_at_a_time(model)
    model(**batch())
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
