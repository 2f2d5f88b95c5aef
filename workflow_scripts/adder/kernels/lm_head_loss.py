"""Cross-entropy fused with a frozen LM head: no logits kept, the gradient to the hidden states computed at once.

The gradient of a token's loss needs the token's own logits alone, so each chunk of tokens yields its losses and, in
the memory of its logits, the gradient to them, which a second matmul turns into that to the hidden states. backward
then only scales rows. (Fused linear cross-entropy; Liger's kernel, Hsu et al. 2024, arXiv:2410.10989, works like that
with chunks of 512 tokens at this vocabulary, too few for the second matmul to fill a large GPU; TRL's computes the
logits once more in backward.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adder.kernels.triton_utils import INTERPRETED, jit, next_power_of_2, runs_kernels, tl

# Logits computed at once: 256 MiB in 16 bit; with a vocabulary of 128,256 that is 1,024 tokens.
CHUNK_LOGITS = 2**27
# Logits that the reference holds in fp32 at once, 64 MiB a matrix: a T4 without the kernel has no room for more.
REFERENCE_LOGITS = 2**24
# Tokens of a chunk are a multiple of this, which tensor cores like.
CHUNK_MULTIPLE = 128


def frozen_lm_head_losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of each token, nats in fp32 (tokens,), differentiable by `hidden` alone.

    hidden: (tokens, width); weight: (vocabulary, width), in hidden's dtype and frozen; target: int64 (tokens,), token
    ids. Logits are rounded to hidden's dtype, as the model's own head rounds them.
    """
    return _FrozenLmHead.apply(hidden, weight, bias, target)


def can_fuse(head: torch.nn.Module, hidden: torch.Tensor) -> bool:
    """Whether frozen_lm_head_losses can and should do the work of a model's LM head on these hidden states."""
    return (
        (hidden.is_cuda or INTERPRETED)
        and type(head) is torch.nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and hidden.dtype == head.weight.dtype
    )


class _FrozenLmHead(Function):
    """The forward and backward pass of frozen_lm_head_losses."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        """Give the losses; keep the gradient to hidden for a loss gradient of 1."""
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
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient to hidden alone."""
        (grad,) = ctx.saved_tensors
        return (grad * d_losses[:, None]).to(grad.dtype), None, None, None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(CHUNK_MULTIPLE, CHUNK_LOGITS // vocabulary // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def cross_entropy_in_place(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return each row's cross-entropy, fp32 (tokens,); overwrite logits, (tokens, vocabulary), by their gradient."""
    if not runs_kernels(logits, "lm_head_loss"):
        return cross_entropy_in_place_reference(logits, target)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(8192, next_power_of_2(logits.shape[1]))
    _cross_entropy[(logits.shape[0],)](
        logits, logits.stride(0), target, losses, logits.shape[1], block, num_warps=16 if block > 4096 else 8
    )
    return losses


def cross_entropy_in_place_reference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As cross_entropy_in_place, a few rows at a time: several matrices in fp32 are made of each."""
    rows = max(1, REFERENCE_LOGITS // logits.shape[1])
    losses = [_rows_in_place(part, own) for part, own in zip(logits.split(rows), target.split(rows), strict=True)]
    return torch.cat(losses) if losses else torch.empty(0, dtype=torch.float32, device=logits.device)


def _rows_in_place(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits_fp32 = logits.float()
    losses = torch.nn.functional.cross_entropy(logits_fp32, target, reduction="none")
    grad = logits_fp32.softmax(-1)
    grad[torch.arange(len(target), device=grad.device), target] -= 1
    logits.copy_(grad)
    return losses


@jit
def _cross_entropy(
    LOGITS: tl.tensor, stride: tl.tensor, TARGET: tl.tensor, LOSSES: tl.tensor, V: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = LOGITS + tl.program_id(0).to(tl.int64) * stride
    target = tl.load(TARGET + tl.program_id(0))
    target_logit = tl.load(row + target).to(tl.float32)
    # Each lane keeps the maximum of its own columns and the sum below it; they are brought together after the loop.
    running_max = tl.full([BLOCK], -float("inf"), tl.float32)
    running_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < V, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(running_max, logit)
        # A lane that has seen nothing yet has -inf for both, and nothing to rescale.
        running_sum = tl.where(
            new_max == -float("inf"), 0.0, running_sum * tl.exp(running_max - new_max) + tl.exp(logit - new_max)
        )
        running_max = new_max
    row_max = tl.max(running_max, 0)
    log_sum_exp = row_max + tl.log(tl.sum(running_sum * tl.exp(running_max - row_max), 0))
    tl.store(LOSSES + tl.program_id(0), log_sum_exp - target_logit)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < V, other=-float("inf")).to(tl.float32)
        grad = tl.exp(logit - log_sum_exp)
        tl.store(row + column, tl.where(column == target, grad - 1, grad), mask=column < V)
