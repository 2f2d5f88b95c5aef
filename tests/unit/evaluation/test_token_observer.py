"""An observer sees the tokens of a generation, and changes none."""

import torch
from transformers import LogitsProcessorList

from adder.evaluation.model_loading import load_model
from adder.evaluation.token_observer import TokenObserver


def test_each_new_token_is_seen_and_none_is_changed(tiny_model_dir):
    model, lengths = load_model(tiny_model_dir, "float32", "cpu"), []
    observer = TokenObserver(lambda ids: lengths.append(tuple(ids.shape)))
    ids = torch.tensor([[5, 6, 7]])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3}
    seen = model.generate(ids, logits_processor=LogitsProcessorList([observer]), **options)
    assert lengths == [(1, 3), (1, 4), (1, 5)]
    assert torch.equal(seen, model.generate(ids, **options))
