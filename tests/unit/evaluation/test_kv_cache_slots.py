"""Slots of a KV cache, filled, freed and filled again."""

import torch
import transformers

from adder.evaluation.kv_cache_slots import KVCacheSlots
from adder.evaluation.model_loading import load_model


def test_freed_slots_are_closed_up_and_keep_their_contents(tiny_model_dir):
    model = load_model(tiny_model_dir, "float32", "cpu")
    cache = KVCacheSlots(model, 4, 6)
    source = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(input_ids=torch.arange(8, 20).view(4, 3), past_key_values=source)
    cache.add([10, 11, 12, 13], [3, 2, 3, 1], [0, 1, 2, 3], source)
    cache.keep([False, True, False, True])
    assert (cache.rows, cache.lengths) == ([13, 11], [1, 2])
    for layer, read in zip(cache.layers, source.layers, strict=True):
        assert torch.equal(layer.keys[:2, :, :3], read.keys[[3, 1]])
        assert torch.equal(layer.values[:2, :, :3], read.values[[3, 1]])
    cache.keep([False, False])
    assert cache.rows == cache.lengths == []


def test_a_step_gives_the_argmax_after_each_reply_at_its_own_length(tiny_model_dir):
    model = load_model(tiny_model_dir, "float32", "cpu")
    prompts, source = [[8, 9, 10], [11, 12]], transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(input_ids=torch.tensor([[8, 9], [11, 0]]), past_key_values=source)
        cache = KVCacheSlots(model, 2, 6)
        cache.add([0, 1], [2, 1], [0, 1], source)
        found = cache.step([10, 12])
        expected = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    assert found == expected and cache.lengths == [3, 2]
