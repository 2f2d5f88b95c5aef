"""Losses of single rows, padded or not, and of a head that is more than a matrix."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.evaluation import heldout_loss
from adder.evaluation.heldout_rows import HeldoutRow
from adder.evaluation.model_loading import load_model


def test_padding_does_not_change_a_loss(tiny_model_dir):
    model = load_model(tiny_model_dir, "float32", "cpu")
    random = torch.Generator().manual_seed(0)
    examples = []
    for length in (40, 7, 23):
        ids = torch.randint(5, 300, (length,), generator=random).tolist()
        examples.append((ids, [IGNORE_INDEX] * 3 + ids[3:]))
    with torch.inference_mode():
        together = heldout_loss.padded_losses(model, examples)
        for (ids, labels), found in zip(examples, together, strict=True):
            alone = heldout_loss.own_head_losses(model, ids, labels)
            assert found.shape == (len(ids) - 3,) and torch.allclose(found, alone, atol=1e-5)


def test_a_model_that_caps_its_logits_is_asked_for_its_own(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = list(range(10, 30))
    row = HeldoutRow("x:1", ids, [IGNORE_INDEX] * 5 + ids[5:], "")
    (found,) = heldout_loss.row_losses(model, [row], Progress.silent())
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([row.labels])).loss
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-4)


def test_batches_hold_rows_of_like_lengths_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(heldout_loss, "LOSS_TOKENS", 20)
    rows = [HeldoutRow(str(n), [0] * length, [0] * length, "") for n, length in enumerate([3, 9, 10, 30, 4, 3])]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    assert heldout_loss.loss_batches(order, rows, 10) == [[3, 2], [1, 4], [0, 5]]
