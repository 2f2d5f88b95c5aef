"""The LM head's cross-entropy: losses and gradients of torch's own, whatever the chunks, no logits left in memory."""

import pytest
import torch

from adder.kernels import lm_head_loss, triton_utils
from kernel_cases import DEVICE, both_types, kernel, off, random


def reference(hidden, weight, bias, target, weights):
    """torch's cross-entropy, by way of all logits."""
    hidden = hidden.detach().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), target, reduction="none"
    )
    (losses * weights).sum().backward()
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("tokens", [1, 128, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_torch_s(monkeypatch, tokens, bias):
    """Weighted token by token, as DFT weights them; in chunks of 128."""
    monkeypatch.setattr(lm_head_loss, "CHUNK_LOGITS", 128 * 97)
    hidden, weight = torch.randn(tokens, 24), torch.randn(97, 24)
    shift = torch.randn(97) if bias else None
    target, weights = torch.randint(97, (tokens,)), torch.rand(tokens)
    expected, expected_grad = reference(hidden, weight, shift, target, weights)
    hidden.requires_grad_()
    losses = lm_head_loss.frozen_lm_head_losses(hidden, weight, shift, target)
    (losses * weights).sum().backward()
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(hidden.grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_an_evaluation_makes_no_gradient():
    hidden, weight = torch.randn(9, 24, requires_grad=True), torch.randn(50, 24)
    with torch.no_grad():
        losses = lm_head_loss.frozen_lm_head_losses(hidden, weight, None, torch.randint(50, (9,)))
    assert not losses.requires_grad


def test_chunks_cover_every_token_once():
    for tokens, vocabulary in ((1, 128256), (5000, 128256), (9000, 32000), (300, 2**28)):
        chunks = lm_head_loss._chunks(tokens, vocabulary)
        covered = [i for chunk in chunks for i in range(chunk.start, chunk.stop)]
        assert covered == list(range(tokens))
        assert all(chunk.stop - chunk.start <= max(128, lm_head_loss.CHUNK_LOGITS // vocabulary) for chunk in chunks)


def test_where_it_applies(monkeypatch):
    head, hidden = torch.nn.Linear(8, 16), torch.randn(2, 8)
    assert (
        not lm_head_loss.can_fuse(head.requires_grad_(False), hidden) or triton_utils.INTERPRETED
    )  # no kernels on a CPU
    monkeypatch.setattr(lm_head_loss, "INTERPRETED", True)
    assert lm_head_loss.can_fuse(head, hidden)
    assert not lm_head_loss.can_fuse(head, hidden.half())
    assert not lm_head_loss.can_fuse(head.requires_grad_(True), hidden)
    assert not lm_head_loss.can_fuse(torch.nn.Sequential(head), hidden)


@kernel
@both_types
@pytest.mark.parametrize(("tokens", "vocabulary"), [(3, 10), (5, 4099), (2, 20000)])
def test_cross_entropy_kernel(dtype, tokens, vocabulary):
    """Losses to fp32's rounding of the reference on the same 16-bit logits; gradients rounded once."""
    logits = random(tokens, vocabulary, dtype=dtype, gap=8) * 5
    logits[0, 1:] -= 20  # a token that is nearly sure
    target = torch.randint(vocabulary, (tokens,), device=DEVICE)
    target[0] = 0
    exact = logits.float()
    expected = lm_head_loss.cross_entropy_in_place_reference(exact, target)
    found = lm_head_loss.cross_entropy_in_place(logits, target)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert off(logits, exact) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
@both_types
def test_head_loss_on_a_gpu(dtype):
    """As near to fp32 as torch's own 16-bit path: at most 1.3 times its error."""
    tokens, vocabulary = 1500, 128256
    hidden, weight = random(tokens, 256, dtype=dtype), random(vocabulary, 256, dtype=dtype) * 0.1
    target, weights = torch.randint(vocabulary, (tokens,), device="cuda"), torch.rand(tokens, device="cuda")
    exact, exact_grad = reference(hidden.float(), weight.float(), None, target, weights)
    usual, usual_grad = reference(hidden, weight, None, target, weights)
    hidden.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = lm_head_loss.frozen_lm_head_losses(hidden, weight, None, target)
    (losses * weights).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2 * lm_head_loss.CHUNK_LOGITS + 2**26
    assert off(losses.detach(), exact) < 1.3 * off(usual, exact) + 1e-4
    assert off(hidden.grad, exact_grad) < 1.3 * off(usual_grad, exact_grad) + 1e-3


def test_the_reference_takes_a_few_rows_at_a_time(monkeypatch):
    logits, target = torch.randn(7, 11), torch.randint(11, (7,))
    whole = logits.clone()
    expected = lm_head_loss.cross_entropy_in_place_reference(whole, target)
    monkeypatch.setattr(lm_head_loss, "REFERENCE_LOGITS", 25)  # two rows
    assert torch.equal(lm_head_loss.cross_entropy_in_place_reference(logits, target), expected)
    assert torch.equal(logits, whole)
    assert lm_head_loss.cross_entropy_in_place_reference(torch.empty(0, 11), target[:0]).shape == (0,)
