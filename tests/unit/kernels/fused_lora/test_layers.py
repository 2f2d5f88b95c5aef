"""The replaced forwards: they run, recompute in checkpointing, and hand back to PEFT where something has changed."""

import pytest
import torch

from adder.kernels import labelled_loss
from adder.kernels.fused_lora import attach
from fused_lora_cases import batch_of, family, step, with_adapter, worst_error


def test_every_layer_is_replaced():
    """A fused model whose layers did not run fused would pass all comparisons."""
    model = with_adapter(family("Llama"))
    attach.attach(model)
    calls = []
    for item in model._fused_lora:
        run = item._run
        item._run = lambda *args, run=run, **kwargs: calls.append(1) or run(*args, **kwargs)
    step(model, batch_of(9, 5))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(name, reentrant):
    """Also with dropout: the mask of the forward pass is made again."""
    model = with_adapter(family(name), lora_dropout=0.3).train()
    attach.attach(model)
    batch = batch_of(9, 23, 14)
    torch.manual_seed(3)
    plain = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again = step(model, batch)
    assert again[0] == pytest.approx(plain[0], rel=1e-6) and worst_error(again[1], plain[1]) < 1e-5
    torch.manual_seed(4)
    assert step(model, batch)[0] != pytest.approx(plain[0], rel=1e-4)


def test_padded_batches_and_a_cache_work():
    model = with_adapter(family("Llama")).eval()
    ids = torch.randint(3, 300, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        replies = model.generate(**options)
        attach.attach(model)
        assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[:, 5:], logits[:, 5:], atol=1e-4)
        assert torch.equal(model.generate(**options), replies)


def test_an_adapter_switched_off_or_merged_is_peft_s_business():
    model = with_adapter(family("Llama")).eval()
    batch = batch_of(9, 23)
    on = step(model, batch)[0]
    with model.disable_adapter():
        off = labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item()
    assert off != pytest.approx(on, rel=1e-3)
    attach.attach(model)
    with model.disable_adapter():
        assert labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item() == pytest.approx(
            off, rel=1e-5
        )
    model.merge_adapter()
    with torch.no_grad():
        assert labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item() == pytest.approx(
            on, rel=1e-4
        )
    model.unmerge_adapter()
    assert step(model, batch)[0] == pytest.approx(on, rel=1e-4)
