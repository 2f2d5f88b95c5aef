"""Cross-entropy of a frozen LM head: two products a token, no logits kept, a gradient to the hidden states at once.

The gradient of a token's loss needs the token's own logits alone, so each chunk of tokens yields its losses and, in
the memory of its logits, the gradient by them, which the second product turns into that to the hidden states. backward
then only weighs rows. (Liger's kernel works like that with chunks of 512 tokens at this vocabulary, too few for the
second product to fill a large GPU; TRL's computes the logits once more in backward.)
"""

from __future__ import annotations

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adder.kernels.triton_utils import jit, runs_kernels, tl, width_of

# Logits computed at once: 256 MiB in 16 bit; with a vocabulary of 128,256 that is 1,024 tokens.
LOGITS = 2**27
# Tokens of a chunk are a multiple of this, which matrix instructions like.
TOKEN_STEP = 128


def frozen_head_losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of each token, nats in fp32 (tokens,), differentiable by `hidden` alone.

    hidden: (tokens, width); weight: (vocabulary, width), in hidden's dtype and frozen; target: int64 (tokens,), each a
    word of the vocabulary. Logits are rounded to hidden's dtype, as the model's own head rounds them.
    """
    return _FrozenHead.apply(hidden, weight, bias, target)


def applies(head: torch.nn.Module, hidden: torch.Tensor) -> bool:
    """Whether frozen_head_losses can and should do the work of a model's LM head on these hidden states."""
    return (
        runs_kernels(hidden)
        and type(head) is torch.nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and hidden.dtype == head.weight.dtype
    )


class _FrozenHead(Function):
    """The steps of frozen_head_losses."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target):
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(hidden.shape[0], weight.shape[0]):
            if bias is None:
                logits = torch.mm(hidden[chunk], weight.t())
            else:
                logits = torch.addmm(bias, hidden[chunk], weight.t())
            losses[chunk] = cross_entropy_in_place(logits, target[chunk])
            if grad is not None:
                torch.mm(logits, weight, out=grad[chunk])
            del logits  # before the next chunk has its own
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses):
        (grad,) = ctx.saved_tensors
        return (grad * d_losses[:, None]).to(grad.dtype), None, None, None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(TOKEN_STEP, LOGITS // vocabulary // TOKEN_STEP * TOKEN_STEP)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def cross_entropy_in_place(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return each row's cross-entropy, fp32 (tokens,); overwrite logits, (tokens, vocabulary), by its gradient."""
    if not runs_kernels(logits):
        return cross_entropy_in_place_reference(logits, target)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(8192, width_of(logits.shape[1]))
    _cross_entropy[(logits.shape[0],)](
        logits, logits.stride(0), target, losses, logits.shape[1], block, num_warps=16 if block > 4096 else 8
    )
    return losses


def cross_entropy_in_place_reference(logits, target):
    """As cross_entropy_in_place."""
    wide = logits.float()
    losses = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    grad = wide.softmax(-1)
    grad[torch.arange(len(target), device=grad.device), target] -= 1
    logits.copy_(grad)
    return losses


@jit
def _cross_entropy(LOGITS, stride, TARGET, LOSSES, V, BLOCK: tl.constexpr):
    row = LOGITS + tl.program_id(0).to(tl.int64) * stride
    target = tl.load(TARGET + tl.program_id(0))
    at_target = tl.load(row + target).to(tl.float32)
    # Each lane keeps the maximum of its own columns and the sum below it; they are brought together after the loop.
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        # A lane that has seen nothing yet has -inf for both, and nothing to rescale.
        total = tl.where(higher == -float("inf"), 0.0, total * tl.exp(largest - higher) + tl.exp(x - higher))
        largest = higher
    highest = tl.max(largest, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(largest - highest), 0))
    tl.store(LOSSES + tl.program_id(0), log_sum - at_target)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < V, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - log_sum)
        tl.store(row + column, tl.where(column == target, grad - 1, grad), mask=column < V)
