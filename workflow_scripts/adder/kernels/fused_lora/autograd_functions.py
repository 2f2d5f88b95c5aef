"""Fused LoRA as autograd functions: linear layers, RMSNorm with queries, keys and values, and a SwiGLU MLP with norm.

Each works on matrices of one row a token. The norms and SwiGLU write straight into the matrices that the matmuls read;
RoPE rotates queries and keys in place, the residual is added by the matmul, and backward computes norms and activations
anew instead of keeping them. After matmuls in fp8 LoRA is added by whichever kernel reads the outputs next, and
gradients are written in fp8 by whichever computes them last: for either alone a pass over a matrix would cost too much.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adder.kernels.fp8 import RowwiseFp8, cache_fp8
from adder.kernels.fused_lora.weights import AnyModule, LinearGroup
from adder.kernels.rmsnorm import rms_norm_backward, rms_norm_into
from adder.kernels.rope import add_lora_and_rope, apply_rope, rope_backward
from adder.kernels.swiglu import MAX_FUSED_RANK, DeferredLora, lora_swiglu_fp8, swiglu_backward, swiglu_into

Gradients = tuple[torch.Tensor | None, ...]


@dataclass
class FrozenRMSNorm:
    """An RMSNorm with frozen weight; `plus_one` as in rms_norm_into."""

    module: AnyModule
    eps: float
    plus_one: bool

    def into(
        self, x: torch.Tensor, out: torch.Tensor, with_fp8: bool = False
    ) -> tuple[torch.Tensor, RowwiseFp8 | None]:
        """As rms_norm_into."""
        return rms_norm_into(x, self.module.weight, self.eps, self.plus_one, out, with_fp8)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, residual: torch.Tensor, with_fp8: bool
    ) -> torch.Tensor:
        """As rms_norm_backward; fp8 values are cached for the function before, whose outputs' gradient this is."""
        dx, dx_fp8 = rms_norm_backward(grad, x, self.module.weight, rstd, self.plus_one, residual, with_fp8)
        if dx_fp8 is not None:
            cache_fp8(dx, dx_fp8)
        return dx


class LoraLinear(Function):
    """Linear layers of one group: (x, residual or None, group, its parameters) to outputs plus residual."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, group: LinearGroup, *parameters: torch.nn.Parameter
    ) -> torch.Tensor:
        """Give (tokens, outputs)."""
        seeds, ctx.p = group.seeds(), group.dropouts()
        y, low_rank = group.forward(x, seeds, residual)
        ctx.save_for_backward(x, low_rank)
        ctx.group, ctx.seeds, ctx.has_residual = group, seeds, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients to x, the residual and the parameters."""
        x, low_rank = ctx.saved_tensors
        group = ctx.group
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            dx, d_low_rank = group.input_grads(grad, joint_matmul=False)
            group.add_input_grad(dx, d_low_rank, ctx.seeds, ctx.p)
        else:
            dx, d_low_rank = None, group.low_rank_grad(grad)
        grads = group.parameter_grads(group.a_grads(d_low_rank, x, ctx.seeds, ctx.p), group.b_grads(grad, low_rank))
        return dx, grad if ctx.has_residual else None, None, *grads


class LoraQKV(Function):
    """RMSNorm, then queries, keys and values, with RoPE.

    (x, norm, cos, sin, head size, group, its parameters) to queries, keys, values, each (tokens, heads, head size), and
    x for the residual, so that its gradient is added within backward. cos and sin are None where nothing is to rotate.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: FrozenRMSNorm,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        head_size: int,
        group: LinearGroup,
        *parameters: torch.nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give queries, keys, values and x."""
        seeds, ctx.p = group.seeds(), group.dropouts()
        buffer = group.buffer(x.shape[0])
        rstd, normed_fp8 = norm.into(x, buffer[:, : group.inputs], group.fp8 is not None)
        keys_end = group.parts[1].rows.stop
        if group.fp8 is not None and cos is not None and sin is not None:
            y, low_rank = group.base_forward(buffer, seeds, normed_fp8)
            add_lora_and_rope(y, low_rank, group.b, group.bias, cos, sin, head_size, keys_end // head_size)
        else:
            y, low_rank = group.forward_from_buffer(buffer, seeds, x_fp8=normed_fp8)
            if cos is not None and sin is not None:
                apply_rope(y[:, :keys_end].unflatten(1, (-1, head_size)), cos, sin)
        query, key, value = (y[:, part.rows].unflatten(1, (-1, head_size)) for part in group.parts)
        ctx.save_for_backward(x, rstd, low_rank, cos, sin)
        ctx.norm, ctx.group, ctx.seeds = norm, group, seeds
        return query, key, value, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, residual: torch.Tensor
    ) -> Gradients:
        """Gradients to x and the parameters."""
        x, rstd, low_rank, cos, sin = ctx.saved_tensors
        group = ctx.group
        with_fp8 = group.fp8 is not None
        grad, grad_fp8 = rope_backward((d_query, d_key, d_value), cos, sin, with_fp8)
        if ctx.needs_input_grad[0]:
            d_normed, d_low_rank = group.input_grads(grad, joint_matmul=True, grad_fp8=grad_fp8)
            group.add_input_grad(d_normed, d_low_rank, ctx.seeds, ctx.p)
            # which overwrites d_normed by the norm's output
            dx, normed = ctx.norm.backward(d_normed, x, rstd, residual.contiguous(), with_fp8), d_normed
        else:  # the first layer's input, out of the frozen embedding
            d_low_rank, dx, normed = group.low_rank_grad(grad), None, torch.empty_like(x)
            ctx.norm.into(x, normed)
        grads = group.parameter_grads(
            group.a_grads(d_low_rank, normed, ctx.seeds, ctx.p), group.b_grads(grad, low_rank)
        )
        return dx, None, None, None, None, None, *grads


class LoraSwiGLU(Function):
    """down(activation(gate(norm(x))) · up(norm(x))) + x; without the norm and the addition where norm is None.

    (x, norm, activation, gate-and-up group, down group, parameters of both) to (tokens, width).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: FrozenRMSNorm | None,
        activation: str,
        gate_up_group: LinearGroup,
        down_group: LinearGroup,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        """Give (tokens, width)."""
        seeds, hidden_seeds = ctx.seeds = gate_up_group.seeds(), down_group.seeds()
        ctx.p = gate_up_group.dropouts(), down_group.dropouts()
        buffer, rstd, normed_fp8 = gate_up_group.buffer(x.shape[0]), None, None
        if norm is None:
            buffer[:, : gate_up_group.inputs].copy_(x)
        else:
            rstd, normed_fp8 = norm.into(x, buffer[:, : gate_up_group.inputs], gate_up_group.fp8 is not None)
        residual = None if norm is None else x
        ctx.defers = _can_defer(gate_up_group, down_group, hidden_seeds)
        if ctx.defers:
            gate_up, low_rank = gate_up_group.base_forward(buffer, seeds, normed_fp8)
            del buffer
            down_group.sync_weights()
            gate, up = (low_rank[:, part.ranks] if part.layers else None for part in gate_up_group.parts)
            deferred = _deferred_lora(gate_up_group)
            hidden_fp8, hidden_low_rank = lora_swiglu_fp8(gate_up, activation, gate, up, deferred, down_group.a)
            y = down_group.forward_fp8(hidden_fp8, hidden_low_rank, residual)
        else:
            gate_up, low_rank = gate_up_group.forward_from_buffer(buffer, seeds, x_fp8=normed_fp8)
            del buffer
            hidden = down_group.buffer(x.shape[0])
            hidden_fp8 = swiglu_into(gate_up, activation, hidden[:, : down_group.inputs], down_group.fp8 is not None)
            y, hidden_low_rank = down_group.forward_from_buffer(hidden, hidden_seeds, residual, hidden_fp8)
        ctx.save_for_backward(x, rstd, low_rank, gate_up, hidden_low_rank)
        ctx.norm, ctx.activation, ctx.groups = norm, activation, (gate_up_group, down_group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients to x and the parameters."""
        x, rstd, low_rank, gate_up, hidden_low_rank = ctx.saved_tensors
        (gate_up_group, down_group), (seeds, hidden_seeds), (p, hidden_p) = ctx.groups, ctx.seeds, ctx.p
        grad = grad.contiguous()
        d_hidden, d_hidden_low_rank = down_group.input_grads(grad, joint_matmul=True)
        (gate, up), (down,) = gate_up_group.parts, down_group.parts
        d_gate_up, lora_grads = swiglu_backward(
            gate_up,
            d_hidden,
            ctx.activation,
            (d_hidden_low_rank[:, down.ranks], down_group.a[down.ranks]) if down.layers else None,
            *(low_rank[:, part.ranks] if part.layers else None for part in (gate, up)),
            dropout=(hidden_seeds[0], hidden_p[0]) if hidden_seeds is not None else None,
            deferred=_deferred_lora(gate_up_group) if ctx.defers else None,
        )
        down_grads = down_group.parameter_grads([lora_grads.down_a], down_group.b_grads(grad, hidden_low_rank))
        del d_hidden, d_hidden_low_rank
        has_norm = ctx.norm is not None
        d_normed, d_low_rank = gate_up_group.input_grads(d_gate_up, joint_matmul=has_norm, amax=lora_grads.amax)
        gate_up_group.add_input_grad(d_normed, d_low_rank, seeds, p)
        if has_norm:  # which overwrites d_normed by the norm's output
            dx, normed = ctx.norm.backward(d_normed, x, rstd, grad, gate_up_group.fp8 is not None), d_normed
        else:
            dx, normed = d_normed, x
        a_grads = gate_up_group.a_grads(d_low_rank, normed, seeds, p)
        grads = gate_up_group.parameter_grads(a_grads, [lora_grads.gate_b, lora_grads.up_b])
        return dx, None, None, None, None, *grads, *down_grads


def _can_defer(gate_up_group: LinearGroup, down_group: LinearGroup, hidden_seeds: list[int] | None) -> bool:
    """Whether lora_swiglu_fp8 can stand between an MLP's matmuls, so that gate_up stays what the fp8 matmul gave."""
    ranks = [down_group.rank, *(part.ranks.stop - part.ranks.start for part in gate_up_group.parts)]
    in_fp8 = gate_up_group.fp8 is not None and down_group.fp8 is not None
    return in_fp8 and hidden_seeds is None and max(ranks) <= MAX_FUSED_RANK


def _deferred_lora(group: LinearGroup) -> DeferredLora:
    """What gate and up lack after the base's matmul alone."""
    gate_b, up_b = (group.b[part.rows, part.ranks] if part.layers else None for part in group.parts)
    return DeferredLora(gate_b, up_b, group.bias)
