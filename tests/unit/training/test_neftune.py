"""NEFTune: noise on the embeddings, in training only, by the length of each example."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from adder.kernels import labelled_loss
from adder.training import base_model, lora, neftune
from gradient_cases import collate
from tiny import pack_rows, token_row
from training_stage import train_settings


def batch_of(*lengths: int) -> dict:
    return collate(pack_rows([[token_row(number, length) for number, length in enumerate(lengths)]]))


def test_lengths_are_those_of_the_examples_of_a_pack():
    embedded = torch.zeros(1, 5, 4)
    assert neftune.lengths(torch.tensor([[0, 1, 2, 0, 1]]), embedded).tolist() == [[3, 3, 3, 2, 2]]
    assert neftune.lengths(None, embedded).tolist() == [[5] * 5]


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_noise_reaches_the_labelled_loss_in_training_only(tiny_model_dir, method, more):
    base, _ = base_model.load(tiny_model_dir, method, "float32", "cpu")
    model = lora.add_adapter(base, train_settings(method=method, lora_dropout=0.0, **more))
    batch, bare = batch_of(20, 12), model.get_base_model()
    quiet = labelled_loss.labelled_losses(bare, **batch).detach()
    neftune.add_noise(model, 5.0)
    torch.manual_seed(0)
    noisy = labelled_loss.labelled_losses(model.train().get_base_model(), **batch).detach()
    again = labelled_loss.labelled_losses(bare, **batch).detach()
    assert not torch.allclose(noisy, quiet, atol=1e-4) and not torch.equal(noisy, again)
    assert torch.equal(labelled_loss.labelled_losses(model.eval().get_base_model(), **batch), quiet)


def test_noise_goes_by_the_length_of_each_example(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, attn_implementation="adder_segments"
    ).train()
    embedding = model.get_input_embeddings()
    plain = embedding(batch_of(100, 4)["input_ids"]).detach()
    neftune.add_noise(model, 5.0)
    seen = []
    embedding.register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    labelled_loss.labelled_losses(model, **batch_of(100, 4))
    gap = (seen[0] - plain).abs()[0]
    for part, length in ((gap[:100], 100), (gap[100:], 4)):
        limit = 5 / (length * 64) ** 0.5
        assert 0.9 * limit < float(part.max()) <= limit
    # One example alone gets what transformers' own hook gives it.
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    seen.clear()
    labelled_loss.labelled_losses(model, **batch_of(100))
    assert 0.9 * 5 / 80 < float((seen[0] - plain[:, :100]).abs().max()) <= 5 / 80
