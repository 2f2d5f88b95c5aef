"""Losses and logits of labelled positions are those of the model's own forward pass over all positions."""

import pytest
import torch

from adder.core.labels import IGNORE_INDEX
from adder.kernels import labelled_loss
from fused_lora_cases import family, with_adapter

IDS = [5, 17, 100, 3, 250, 31, 8]
LABELS = [IGNORE_INDEX, IGNORE_INDEX, 100, 3, IGNORE_INDEX, 31, 8]


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([IDS]), "labels": torch.tensor([LABELS])}


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_logits_are_the_models_own_where_a_label_is(name):
    """Gemma 2 caps them."""
    model = family(name)
    with torch.no_grad():
        logits, target = labelled_loss.labelled_logits(model, IDS, LABELS)
        own = model(input_ids=torch.tensor([IDS])).logits[0]
    assert target.tolist() == [100, 3, 31, 8]
    assert torch.allclose(logits, own[[1, 2, 4, 5]], atol=1e-5)


def test_logits_of_an_adapted_model_are_with_its_adapter():
    model = with_adapter(family("Llama"))
    with torch.no_grad():
        logits, _ = labelled_loss.labelled_logits(model, IDS, LABELS)
        assert torch.allclose(logits, model(input_ids=torch.tensor([IDS])).logits[0, [1, 2, 4, 5]], atol=1e-5)


def test_losses_are_the_cross_entropies_of_these_logits(monkeypatch):
    """Whatever the chunks."""
    model = family("Llama")
    monkeypatch.setattr(labelled_loss, "CHUNK_POSITIONS", 3)
    with torch.no_grad():
        logits, target = labelled_loss.labelled_logits(model, IDS, LABELS)
        losses = labelled_loss.labelled_losses(model, **batch())
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert losses.dtype == torch.float32 and torch.allclose(losses, expected, atol=1e-5)


def test_a_batch_without_labels_has_no_losses():
    labels = torch.full((1, len(IDS)), IGNORE_INDEX)
    assert labelled_loss.labelled_losses(family("Llama"), labels, input_ids=torch.tensor([IDS])).shape == (0,)


@pytest.mark.parametrize(("name", "plain"), [("Llama", True), ("Gemma2", False), ("Cohere", False)])
def test_the_mean_loss_is_the_models_own_whatever_its_head(name, plain):
    model = family(name)
    assert labelled_loss.has_plain_head(model) is plain
    with torch.no_grad():
        found, own = labelled_loss.mean_loss(model, batch()), model(**batch()).loss
    assert found.item() == pytest.approx(own.item(), rel=1e-5)


def test_whether_a_head_is_plain_is_tried_and_not_read_off_a_name():
    """A scale that a configuration names and the model doesn't apply, and one under a name that nobody knows."""
    unused = family("Llama")
    unused.config.logit_scale = 0.5
    assert labelled_loss.has_plain_head(unused)
    scaled, own = family("Llama"), type(family("Llama")).forward

    def forward(self, *args, **options):
        output = own(self, *args, **options)
        output.logits = output.logits / 1.5
        return output

    scaled.forward = forward.__get__(scaled)
    before = scaled.training
    assert not labelled_loss.has_plain_head(scaled) and scaled.training is before


def test_a_residual_stream_in_fp32_goes_through_a_head_in_16_bits():
    model = family("Llama").to(torch.bfloat16)
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.float())
    with torch.no_grad():
        assert torch.isfinite(labelled_loss.labelled_losses(model, **batch())).all()


def test_models_with_plain_heads_train_by_labelled_losses_on_a_cpu():
    assert labelled_loss.supports_training(family("Llama"))
    assert not labelled_loss.supports_training(family("Gemma2"))


def test_dft_weights_each_loss_by_the_probability_of_its_token():
    losses = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    weighted = labelled_loss.dft(losses)
    weighted.sum().backward()
    weights = torch.exp(-losses.detach())
    assert torch.equal(weighted, losses * weights) and torch.equal(losses.grad, weights)
