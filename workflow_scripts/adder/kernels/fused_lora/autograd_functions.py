"""Folded LoRA as differentiable steps: linear layers, norm with queries, keys and values, and a whole gated MLP.

Each is an autograd function over matrices of one row a token. The norms and the gated activation write straight into
the matrices that the products read; the rotary embedding turns queries and keys in place, the residual is added by the
product, and backward computes norms and activations anew instead of keeping them. After products in fp8 the pairs'
share is added by whichever kernel reads the outputs next, and gradients are written in fp8 by whichever computes them
last: for either alone a pass over a matrix would cost too much.
"""

from dataclasses import dataclass

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adder.kernels.fp8 import RowwiseFp8, cache_fp8
from adder.kernels.fused_lora.weights import Group
from adder.kernels.rmsnorm import rms_norm_backward, rms_norm_into
from adder.kernels.rope import add_lora_and_rope, apply_rope, rope_backward
from adder.kernels.swiglu import MAX_FUSED_RANK, DeferredLora, lora_swiglu_fp8, swiglu_backward, swiglu_into


@dataclass
class Norm:
    """An RMSNorm with frozen weight; `plus_one` as in rms_norm_into."""

    module: torch.nn.Module
    eps: float
    plus_one: bool

    def into(
        self, x: torch.Tensor, out: torch.Tensor, quantised: bool = False
    ) -> tuple[torch.Tensor, RowwiseFp8 | None]:
        """As rms_norm_into."""
        return rms_norm_into(x, self.module.weight, self.eps, self.plus_one, out, quantised)

    def backward(self, grad, x, inverse, residual, quantised: bool) -> torch.Tensor:
        """As rms_norm_backward; fp8 values are remembered for the step before, whose outputs' gradient this is."""
        result, rows = rms_norm_backward(grad, x, self.module.weight, inverse, self.plus_one, residual, quantised)
        if rows is not None:
            cache_fp8(result, rows)
        return result


class Linear(Function):
    """Linear layers of one group: (x, residual or None, group, its parameters) to outputs plus residual."""

    @staticmethod
    def forward(ctx, x, residual, group, *parameters):
        seeds, ctx.p = group.seeds(), group.dropouts()
        y, low_rank = group.product_of(x, seeds, residual)
        ctx.save_for_backward(x, low_rank)
        ctx.group, ctx.seeds, ctx.has_residual = group, seeds, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, low_rank = ctx.saved_tensors
        group = ctx.group
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            dx, d_low_rank = group.input_grads(grad, together=False)
            group.add_input_grad(dx, d_low_rank, ctx.seeds, ctx.p)
        else:
            dx, d_low_rank = None, group.low_rank_grad(grad)
        grads = group.parameter_grads(group.a_grads(d_low_rank, x, ctx.seeds, ctx.p), group.b_grads(grad, low_rank))
        return dx, grad if ctx.has_residual else None, None, *grads


class AttentionInput(Function):
    """Norm, then queries, keys and values, turned by their positions.

    (x, norm, cos, sin, head size, group, its parameters) to queries, keys, values, each (tokens, heads, head size), and
    x for the residual, so that its gradient is added within backward. cos and sin are None where they are not to turn.
    """

    @staticmethod
    def forward(ctx, x, norm, cos, sin, size, group, *parameters):
        seeds, ctx.p = group.seeds(), group.dropouts()
        buffer = group.buffer(x.shape[0])
        inverse, rows = norm.into(x, buffer[:, : group.inputs], group.fp8 is not None)
        keys_end = group.parts[1].rows.stop
        if group.fp8 is not None and cos is not None:
            y, low_rank = group.bare_product(buffer, seeds, rows)
            add_lora_and_rope(y, low_rank, group.b, group.bias, cos, sin, size, keys_end // size)
        else:
            y, low_rank = group.product(buffer, seeds, rows=rows)
            if cos is not None:
                turned = y[:, :keys_end].unflatten(1, (-1, size))
                apply_rope(turned, cos, sin)
        query, key, value = (y[:, part.rows].unflatten(1, (-1, size)) for part in group.parts)
        ctx.save_for_backward(x, inverse, low_rank, cos, sin)
        ctx.norm, ctx.group, ctx.seeds = norm, group, seeds
        return query, key, value, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_query, d_key, d_value, residual):
        x, inverse, low_rank, cos, sin = ctx.saved_tensors
        group = ctx.group
        in_fp8 = group.fp8 is not None
        grad, rows = rope_backward((d_query, d_key, d_value), cos, sin, in_fp8)
        if ctx.needs_input_grad[0]:
            dx, d_low_rank = group.input_grads(grad, together=True, rows=rows)
            group.add_input_grad(dx, d_low_rank, ctx.seeds, ctx.p)
            result, normed = ctx.norm.backward(dx, x, inverse, residual.contiguous(), in_fp8), dx
        else:  # the first layer's input, out of the frozen embedding
            d_low_rank, result, normed = group.low_rank_grad(grad), None, torch.empty_like(x)
            ctx.norm.into(x, normed)
        grads = group.parameter_grads(
            group.a_grads(d_low_rank, normed, ctx.seeds, ctx.p), group.b_grads(grad, low_rank)
        )
        return result, None, None, None, None, None, *grads


class GatedMLP(Function):
    """down(activation(gate(norm(x))) · up(norm(x))) + x; without the norm and the addition where norm is None.

    (x, norm, activation, gate-and-up group, down group, parameters of both) to (tokens, width).
    """

    @staticmethod
    def forward(ctx, x, norm, activation, first, second, *parameters):
        ctx.seeds, ctx.p = (first.seeds(), second.seeds()), (first.dropouts(), second.dropouts())
        buffer, inverse, rows = first.buffer(x.shape[0]), None, None
        if norm is None:
            buffer[:, : first.inputs].copy_(x)
        else:
            inverse, rows = norm.into(x, buffer[:, : first.inputs], first.fp8 is not None)
        residual = None if norm is None else x
        ctx.fused = _fuses(first, second, ctx.seeds[1])
        if ctx.fused:
            gate_up, low_rank = first.bare_product(buffer, ctx.seeds[0], rows)
            del buffer
            second.follow()
            thin = (low_rank[:, part.ranks] if part.layers else None for part in first.parts)
            rows, hidden_low_rank = lora_swiglu_fp8(gate_up, activation, *thin, _left_out(first), second.a)
            y = second.fp8_product(rows, hidden_low_rank, residual)
        else:
            gate_up, low_rank = first.product(buffer, ctx.seeds[0], rows=rows)
            del buffer
            hidden = second.buffer(x.shape[0])
            rows = swiglu_into(gate_up, activation, hidden[:, : second.inputs], second.fp8 is not None)
            y, hidden_low_rank = second.product(hidden, ctx.seeds[1], residual, rows)
        ctx.save_for_backward(x, inverse, low_rank, gate_up, hidden_low_rank)
        ctx.norm, ctx.activation, ctx.groups = norm, activation, (first, second)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inverse, low_rank, gate_up, hidden_low_rank = ctx.saved_tensors
        (first, second), (seeds, hidden_seeds), (p, hidden_p) = ctx.groups, ctx.seeds, ctx.p
        grad = grad.contiguous()
        d_hidden, d_hidden_low_rank = second.input_grads(grad, together=True)
        (gate, up), (down,) = first.parts, second.parts
        d_gate_up, thin = swiglu_backward(
            gate_up,
            d_hidden,
            ctx.activation,
            (d_hidden_low_rank[:, down.ranks], second.a[down.ranks]) if down.layers else None,
            *(low_rank[:, part.ranks] if part.layers else None for part in (gate, up)),
            dropout=(hidden_seeds[0], hidden_p[0]) if hidden_seeds is not None else None,
            deferred=_left_out(first) if ctx.fused else None,
        )
        down_grads = second.parameter_grads([thin.down_a], second.b_grads(grad, hidden_low_rank))
        del d_hidden, d_hidden_low_rank
        dx, d_low_rank = first.input_grads(d_gate_up, together=ctx.norm is not None, largest=thin.amax)
        first.add_input_grad(dx, d_low_rank, seeds, p)
        if ctx.norm is None:
            result, normed = dx, x
        else:
            result, normed = ctx.norm.backward(dx, x, inverse, grad, first.fp8 is not None), dx
        grads = first.parameter_grads(first.a_grads(d_low_rank, normed, seeds, p), [thin.gate_b, thin.up_b])
        return result, None, None, None, None, *grads, *down_grads


def _fuses(first: Group, second: Group, hidden_seeds: list[int] | None) -> bool:
    """Whether gated_rows can stand between an MLP's products, so that gate_up stays what the fp8 product gave."""
    ranks = [second.rank, *(part.ranks.stop - part.ranks.start for part in first.parts)]
    in_fp8 = first.fp8 is not None and second.fp8 is not None
    return in_fp8 and hidden_seeds is None and max(ranks) <= MAX_FUSED_RANK


def _left_out(first: Group) -> DeferredLora:
    """What gate and up lack as bare products."""
    return DeferredLora(*(first.b[part.rows, part.ranks] if part.layers else None for part in first.parts), first.bias)
