"""Slots with steps of a fixed shape: the same replies as transformers' generate, or the usual slots instead."""

from contextlib import contextmanager

import pytest
import torch

from adder.evaluation import graph_slots, speculative_decoding
from adder.kernels.inference_layers import fused_for_inference
from decoding_cases import FAMILIES, STOPS, by_transformers, make, prompts, requests_with_drafts

LLAMA_LIKE = {"Llama", "Qwen2", "Qwen3"}


@pytest.fixture
def steps_of_graphs(monkeypatch):
    """The slots of a GPU on any device; gives what was agreed on, by whether layers were fused."""
    tried = []

    @contextmanager
    def slots(model, texts, count, capacity):
        with graph_slots.ExitStack() as stack:
            found = graph_slots.graph_slots(model, texts, count, capacity, stack)
            tried.append((found is not None, any("forward" in layer.__dict__ for layer in layers_of(model))))
            yield found or graph_slots.KVCacheSlots(model, count, capacity)

    monkeypatch.setattr(speculative_decoding, "fastest_slots", slots)
    return tried


def layers_of(model):
    return getattr(model.base_model, "layers", [])


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("draft", ["none", "mixed"])
def test_replies_of_every_family_are_those_of_generate(steps_of_graphs, family, draft):
    model = make(family)
    expected, requests = requests_with_drafts(model, prompts(), draft, 12)
    found = speculative_decoding.generate(model, requests, STOPS, 12, 4, lambda _: None)
    assert [reply.ids for reply in found] == expected
    assert steps_of_graphs == [(True, family in LLAMA_LIKE)]


def test_a_model_computes_and_trains_as_before_afterwards(steps_of_graphs):
    model = make("Llama")
    ids = torch.tensor([prompts()[0]])
    before, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    speculative_decoding.generate(
        model, [speculative_decoding.Request(p, len(p)) for p in prompts()], STOPS, 6, 4, lambda _: None
    )
    assert not any("forward" in layer.__dict__ for layer in layers_of(model))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)
    model(ids).logits.sum().backward()
    assert model.base_model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_model_that_computes_something_else_by_it_keeps_the_usual_slots(steps_of_graphs, monkeypatch):
    def other_attention(*args, **kwargs):
        mixed, none = graph_slots.attend_to_cache(*args, **kwargs)
        return mixed * 1.5, none

    graph_slots.AttentionInterface.register("adder_other", other_attention)
    monkeypatch.setattr(graph_slots, "NAME", "adder_other")
    model = make("Llama")
    asked = prompts()
    expected = [by_transformers(model, prompt, 9) for prompt in asked]
    requests = [speculative_decoding.Request(prompt, len(prompt)) for prompt in asked]
    found = speculative_decoding.generate(model, requests, STOPS, 9, 4, lambda _: None)
    assert [reply.ids for reply in found] == expected and steps_of_graphs == [(False, False)]


def test_layers_with_another_activation_are_not_fused():
    model = make("Llama", hidden_act="relu")
    with fused_for_inference(model) as count:
        assert count == 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(FAMILIES))
def test_graphs_on_a_gpu_write_the_replies_of_generate(family):
    model = make(family).cuda()
    asked = prompts(30)
    expected = [by_transformers(model, prompt, 40) for prompt in asked]
    requests = [speculative_decoding.Request(prompt, len(prompt)) for prompt in asked]
    found = speculative_decoding.generate(model, requests, STOPS, 40, 8, lambda _: None)
    assert [reply.ids for reply in found] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(LLAMA_LIKE))
def test_on_a_gpu_steps_are_graphs_of_fused_layers(family, dtype):
    model = make(family).to("cuda", dtype)
    with graph_slots.ExitStack() as stack, torch.inference_mode():
        slots = graph_slots.graph_slots(model, prompts(), 8, 64, stack)
        assert slots is not None and slots.graph is not None
        assert all("forward" in layer.__dict__ for layer in layers_of(model))
