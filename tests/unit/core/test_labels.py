"""The label without loss is the one that torch leaves out by default."""

import inspect

import torch

from adder.core.labels import IGNORE_INDEX


def test_torch_leaves_it_out_by_default():
    assert inspect.signature(torch.nn.functional.cross_entropy).parameters["ignore_index"].default == IGNORE_INDEX
    logits = torch.randn(3, 5)
    some = torch.nn.functional.cross_entropy(logits, torch.tensor([1, IGNORE_INDEX, 2]))
    assert torch.equal(some, torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([1, 2])))
