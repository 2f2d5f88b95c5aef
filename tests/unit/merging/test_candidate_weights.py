"""Weights held in a loaded model are those that the merge writes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from adder.evaluation.model_loading import load_model
from adder.merging import base_choice, candidate_weights, streamed_merge
from adder.merging.candidate_weights import AsStored
from adder.merging.streamed_merge import merge_weights
from adder.merging.verification import Loaded, row_losses, spread_rows
from adder.merging.weight_deltas import read_adapter
from merge_fixture import SILENT, make_inputs, weights
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    base = save_tiny_model(folder / "base", hidden_size=128, intermediate_size=192, tie_word_embeddings=False)
    return make_inputs(folder / "in", base, size=0.05, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("quantised", [False, True])
def test_a_model_holds_what_would_be_written(inputs, tmp_path, quantised):
    base, deltas = inputs["model"] / "model", read_adapter(inputs["train"] / "adapter")
    if quantised:
        deltas = base_choice.on_dequantised(base, deltas, torch.bfloat16, "cpu")
    merge_weights(base, deltas, tmp_path, SILENT)
    model = load_model(base, "bfloat16", "cpu")
    assert candidate_weights.can_hold(model, base, deltas)
    candidate_weights.hold(model, base, deltas, SILENT)
    written, held = weights(tmp_path), model.state_dict()
    assert all(torch.equal(held[name], value) for name, value in written.items())
    candidate_weights.hold(model, base, {name: AsStored(delta.shape) for name, delta in deltas.items()}, SILENT)
    assert all(torch.equal(held[name], value) for name, value in weights(base).items())


def test_a_model_with_other_names_or_shapes_holds_nothing(inputs):
    base = inputs["model"] / "model"
    model = AutoModelForCausalLM.from_pretrained(base)
    assert candidate_weights.can_hold(model, base, ["model.norm.weight"])
    assert not candidate_weights.can_hold(model, base, ["model.norm.weight", "vision.norm.weight"])
    model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    assert not candidate_weights.can_hold(model, base, ["model.norm.weight"])


def test_losses_of_rows_in_batches_are_those_of_each_alone(inputs):
    rows = spread_rows(inputs["tokenize"] / "heldout.arrow", 64, 8192)
    model = load_model(inputs["model"] / "model", "float32", "cpu")
    found, expected = candidate_weights.losses(model, rows), row_losses(Loaded(model, False), rows)
    for (nats, count), (alone, tokens) in zip(found, expected, strict=True):
        assert count == tokens and nats == pytest.approx(alone, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True])
def test_on_a_gpu_a_weight_is_at_most_the_other_neighbour_of_what_would_be_written(inputs, tmp_path, quantised):
    base, deltas = inputs["model"] / "model", read_adapter(inputs["train"] / "adapter")
    if quantised:
        deltas = base_choice.on_dequantised(base, deltas, torch.bfloat16, "cuda")
    merge_weights(base, deltas, tmp_path, SILENT)
    model = load_model(base, "bfloat16", "cuda")
    candidate_weights.hold(model, base, deltas, SILENT)
    held = {name: value.cpu() for name, value in model.state_dict().items()}
    for name, value in weights(tmp_path).items():
        apart = (held[name].view(torch.int16).int() - value.view(torch.int16).int()).abs()
        assert apart.max() <= (1 if name in deltas else 0)
    candidate_weights.hold(model, base, {name: AsStored(delta.shape) for name, delta in deltas.items()}, SILENT)
    assert all(torch.equal(model.state_dict()[name].cpu(), value) for name, value in weights(base).items())


def test_blocks_of_a_tensor_become_one(inputs, monkeypatch):
    monkeypatch.setattr(streamed_merge, "BLOCK", 1000)
    base, deltas = inputs["model"] / "model", read_adapter(inputs["train"] / "adapter")
    plan = streamed_merge.layout(base / "model.safetensors")
    changed = [block for block in streamed_merge.blocks(plan, deltas) if isinstance(block, streamed_merge.ChangedBlock)]
    whole = candidate_weights.whole_tensors(changed)
    assert len(changed) > len(whole) == len(deltas)
    assert sum(block.stop - block.start for block in whole) == sum(block.stop - block.start for block in changed)
