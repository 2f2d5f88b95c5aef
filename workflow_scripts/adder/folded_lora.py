"""LoRA folded into the base model's products: training speed, not other numbers.

For a frozen weight W (outputs, inputs) with LoRA pair A (rank, inputs), B (outputs, rank) and scaling s, PEFT computes
x·Wᵀ + s·(x·Aᵀ)·Bᵀ in five steps over matrices as large as the output. Here the matrix [W | s·B] is kept, and
activations are written as [x | x·Aᵀ], so that
- forward is the one product [x | x·Aᵀ] · [W | s·B]ᵀ;
- backward to the input is the one product dy · [W | s·B], which yields dx and d(x·Aᵀ) together; what is left is thin.
Layers that read the same input (query, key, value; gate, up) share one product. Where a decoder layer is of Llama's
kind, the norms and the gated activation write straight into those matrices, the rotary embedding turns queries and
keys in place, the residual is added by the product, and backward computes norms and activations anew instead of
keeping them.

PEFT's modules and fp32 parameters stay what the optimizer steps and what is saved: only `forward` of the modules
changes, and [.. | s·B] follows the parameters whenever they have changed. What does not fit is left to PEFT.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adder import hardware, kernels
from adder.choice import Choice

# Share of the free memory that the values of NF4 weights may take; beyond it they are dequantised in each product.
HELD_SHARE = 0.4
# Rows of matrices begin at multiples of this many numbers, 256 bytes in 16 bit: half a per cent of a step on an H100
# against 64 numbers.
ROW_STEP = 128
# A product over columns that 8 does not divide falls back to slower kernels.
RANK_STEP = 8
# Relative difference to the module replaced that rounding explains, by dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-4}
ATTENTION = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
RECORDER = "adder_recorder"
RECORDED = {"query", "key", "value", "mask", "dropout", "change"}
# Tokens that a replacement is compared on.
PROBE_TOKENS = 24


# Steps of any optimizer in this process: torch's fused ones change parameters without raising their version.
_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Unfit(Exception):
    """A module is not of a kind that can be folded; the message says why."""


# Linear layers that share an input ------------------------------------------------------------------------------------


@dataclass
class Part:
    """One linear layer of a group: PEFT's wrapper or a bare layer, and its place in the group's matrices."""

    parent: torch.nn.Module
    name: str
    module: torch.nn.Module
    base: torch.nn.Module
    adapter: str | None
    rows: slice = field(default_factory=lambda: slice(0, 0))
    ranks: slice = field(default_factory=lambda: slice(0, 0))

    @property
    def pair(self) -> list[torch.nn.Parameter]:
        """A and B, or nothing."""
        if self.adapter is None:
            return []
        return [self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight]

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.adapter]

    @property
    def dropout(self) -> float:
        """Probability with which the adapter's input is dropped now."""
        layer = self.module.lora_dropout[self.adapter] if self.adapter else None
        return layer.p if isinstance(layer, torch.nn.Dropout) and layer.training else 0.0

    def intact(self) -> bool:
        """Whether the model still asks for what was folded: not merged, switched off, exchanged or listened to."""
        module = self.module
        if getattr(self.parent, self.name) is not module or module._forward_hooks or module._forward_pre_hooks:
            return False
        if self.adapter is None:
            return True
        return not module.disable_adapters and not module.merged and module.active_adapters == [self.adapter]


def _part(parent: torch.nn.Module, name: str, dtype: torch.dtype) -> Part:
    module = getattr(parent, name)
    base, adapter = module, None
    if isinstance(module, LoraLayer):
        base = module.base_layer
        if type(module).__name__ not in {"Linear", "Linear4bit"} or getattr(module, "fan_in_fan_out", False):
            raise Unfit(f"PEFT layer {type(module).__name__}")
        present = [name for name in module.active_adapters if name in module.lora_A]
        if module.active_adapters != present or len(present) != 1:
            raise Unfit("not one active adapter")
        adapter = present[0]
        if adapter in module.lora_variant or module.lora_bias.get(adapter):
            raise Unfit("a LoRA variant")
        if not isinstance(module.lora_dropout[adapter], torch.nn.Dropout | torch.nn.Identity):
            raise Unfit("an unknown dropout")
    quantised = type(base).__name__ == "Linear4bit" and getattr(base.weight, "quant_state", None) is not None
    if not quantised and type(base) is not torch.nn.Linear:
        raise Unfit(f"base layer {type(base).__name__}")
    if not quantised and base.weight.dtype != dtype:
        raise Unfit(f"base weights in {base.weight.dtype}")
    if any(parameter.requires_grad for parameter in base.parameters()):
        raise Unfit("base weights that are trained")
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        raise Unfit("a forward that another library has replaced")
    return Part(parent, name, module, base, adapter)


class Workspace:
    """Memory for one group's matrix at a time, for NF4 weights whose values are not held."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.numbers = dtype, device, 0
        self.memory = None

    def reserve(self, numbers: int) -> None:
        """Make room for at least this many numbers."""
        self.numbers = max(self.numbers, numbers)

    def take(self, rows: int, stride: int) -> torch.Tensor:
        """A matrix (rows, stride), whose contents last until the next one is taken."""
        if self.memory is None or self.memory.numel() < self.numbers:
            self.memory = torch.zeros(self.numbers, dtype=self.dtype, device=self.device)
        return self.memory[: rows * stride].view(rows, stride)


class Group:
    """Frozen linear layers over one input, with their LoRA pairs, as the product with [W | s·B].

    Sizes: `inputs`; `outputs`, all layers' together; `rank`, all pairs' together, rounded up with columns of zeros;
    `width` = inputs + rank. B stands in blocks: the rows of one layer are zero in the columns of another's pair.
    """

    def __init__(self, parts: list[Part], dtype: torch.dtype, workspace: Workspace | None):
        self.parts, self.dtype = parts, dtype
        sizes = [_shape(part.base) for part in parts]
        self.inputs = sizes[0][1]
        self.outputs = rank = 0
        for part, (outputs, _) in zip(parts, sizes, strict=True):
            part.rows = slice(self.outputs, self.outputs + outputs)
            part.ranks = slice(rank, rank + (part.pair[0].shape[0] if part.pair else 0))
            self.outputs, rank = part.rows.stop, part.ranks.stop
        self.rank = _up(rank, RANK_STEP)
        self.width = self.inputs + self.rank
        self.stride = _up(self.width, ROW_STEP)
        device = parts[0].base.weight.device
        self.a = torch.zeros(self.rank, self.inputs, dtype=dtype, device=device)
        self.bias = self._bias(device)
        self.workspace = workspace if all(_quantised(part.base) for part in parts) else None
        self.seen = None
        if self.workspace is None:
            self.held = torch.zeros(self.outputs, self.stride, dtype=dtype, device=device)[:, : self.width]
            self._fill(self.held)
            self.b = self.held[:, self.inputs :]
            for part in parts:
                if not _quantised(part.base):  # PEFT's own layer reads the same memory
                    part.base.weight.data = self.held[part.rows, : self.inputs]
        else:
            workspace.reserve(self.outputs * self.stride)
            self.held = None
            self.b = torch.zeros(self.outputs, self.rank, dtype=dtype, device=device)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of every pair, in the order in which `parameter_grads` returns gradients."""
        return [parameter for part in self.parts for parameter in part.pair]

    @property
    def nbytes(self) -> int:
        """Bytes of [W | s·B]."""
        return self.outputs * self.stride * self.dtype.itemsize

    def release(self) -> None:
        """Give the layers weights of their own again."""
        for part in self.parts:
            if not _quantised(part.base):
                part.base.weight.data = part.base.weight.data.contiguous()

    def intact(self) -> bool:
        """Whether every layer still is what was folded."""
        return all(part.intact() for part in self.parts)

    def seeds(self) -> list[int] | None:
        """A dropout seed for each part, drawn from torch's generator (checkpointing draws it again); None without."""
        if all(part.dropout == 0 for part in self.parts):
            return None
        return [int(torch.randint(2**31, ())) for _ in self.parts]

    def _bias(self, device: torch.device) -> torch.Tensor | None:
        if all(part.base.bias is None for part in self.parts):
            return None
        bias = torch.zeros(self.outputs, dtype=self.dtype, device=device)
        for part in self.parts:
            if part.base.bias is not None:
                bias[part.rows] = part.base.bias.data.to(self.dtype)
        return bias

    def _fill(self, matrix: torch.Tensor) -> None:
        for part in self.parts:
            target, weight = matrix[part.rows, : self.inputs], part.base.weight
            if _quantised(part.base):
                kernels.dequantise_into(weight.data, weight.quant_state, target)
            else:
                target.copy_(weight.data)

    @torch.no_grad()
    def _follow(self) -> None:
        """Copy A and s·B out of the parameters if these have changed since."""
        state = [_optimizer_steps, *((p.data_ptr(), p._version) for p in self.parameters)]
        state += [part.scaling for part in self.parts if part.pair]
        if state == self.seen:
            return
        for part in self.parts:
            if part.pair:
                a, b = part.pair
                self.a[part.ranks].copy_(a)
                self.b[part.rows, part.ranks].copy_(b * part.scaling)
        self.seen = state

    def matrix(self) -> torch.Tensor:
        """[W | s·B], (outputs, width), strided; in a workspace it lasts until the next group's."""
        if self.held is not None:
            return self.held
        matrix = self.workspace.take(self.outputs, self.stride)[:, : self.width]
        self._fill(matrix)
        matrix[:, self.inputs :].copy_(self.b)
        return matrix

    def buffer(self, tokens: int) -> torch.Tensor:
        """Memory for [x | x·Aᵀ], (tokens, width), strided; its first `inputs` columns are the caller's to fill."""
        return torch.empty(tokens, self.stride, dtype=self.dtype, device=self.a.device)[:, : self.width]

    def product(
        self, buffer: torch.Tensor, seeds: list[int] | None, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From [x | ?] return the layers' outputs, (tokens, outputs), plus `residual`; and x·Aᵀ, (tokens, rank)."""
        self._follow()
        x, low_rank = buffer[:, : self.inputs], buffer[:, self.inputs :]
        if seeds is not None:
            low_rank.zero_()
            for part, seed in zip(self.parts, seeds, strict=True):
                if part.pair:
                    out = low_rank[:, part.ranks]
                    kernels.dropped_product(x, self.a[part.ranks], seed, part.dropout, out)
        elif self.rank:
            torch.mm(x, self.a.t(), out=low_rank)
        matrix = self.matrix().t()
        if residual is not None:
            y = torch.addmm(residual, buffer, matrix)
            y = y if self.bias is None else y.add_(self.bias)
        elif self.bias is not None:
            y = torch.addmm(self.bias, buffer, matrix)
        else:
            y = torch.mm(buffer, matrix)
        return y, low_rank.contiguous()

    def input_grads(self, grad: torch.Tensor, together: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """From the outputs' gradient return dx, (tokens, inputs), without the adapters' share, and d(x·Aᵀ).

        `together`: by one product, both strided; else dx is contiguous.
        """
        if together:
            both = torch.empty(grad.shape[0], self.stride, dtype=grad.dtype, device=grad.device)[:, : self.width]
            torch.mm(grad, self.matrix(), out=both)
            return both[:, : self.inputs], both[:, self.inputs :]
        return torch.mm(grad, self.matrix()[:, : self.inputs]), self.low_rank_grad(grad)

    def low_rank_grad(self, grad: torch.Tensor) -> torch.Tensor:
        """d(x·Aᵀ) alone, (tokens, rank)."""
        return torch.mm(grad, self.b)

    def add_input_grad(self, dx: torch.Tensor, low_rank: torch.Tensor, seeds: list[int] | None, p: list[float]) -> None:
        """Add the adapters' share to dx in place."""
        if seeds is None and self.rank:
            dx.addmm_(low_rank, self.a)
        for part, seed, drop in zip(self.parts, seeds or [], p, strict=False):
            if part.pair:
                kernels.add_dropped_input_grad(dx, low_rank[:, part.ranks], self.a[part.ranks], seed, drop)

    def a_grads(
        self, low_rank_grad: torch.Tensor, x: torch.Tensor, seeds: list[int] | None, p: list[float]
    ) -> list[torch.Tensor | None]:
        """Gradient of each part's A, fp32. low_rank_grad: of x·Aᵀ, (tokens, rank)."""
        if seeds is None and self.rank:
            whole = _product_fp32(low_rank_grad.t(), x)
        grads = []
        for i, part in enumerate(self.parts):
            if not part.pair:
                grads.append(None)
            elif seeds is None:
                grads.append(whole[part.ranks])
            else:
                grads.append(kernels.dropped_weight_grad(low_rank_grad[:, part.ranks], x, seeds[i], p[i]))
        return grads

    def b_grads(self, grad: torch.Tensor, low_rank: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradient of each part's s·B, fp32. grad: of the outputs; low_rank: x·Aᵀ."""
        # One product for all, of whose blocks those on the diagonal count: reading `grad` is what takes the time.
        whole = _product_fp32(grad.t(), low_rank) if self.rank else None
        return [whole[part.rows, part.ranks] if part.pair else None for part in self.parts]

    def parameter_grads(self, a_grads: list, b_grads: list) -> list[torch.Tensor]:
        """Gradients of `parameters` from those of A and s·B."""
        grads = []
        for part, grad_a, grad_b in zip(self.parts, a_grads, b_grads, strict=True):
            if part.pair:
                a, b = part.pair
                grads += [grad_a.to(a.dtype), (grad_b * part.scaling).to(b.dtype)]
        return grads

    def dropouts(self) -> list[float]:
        """Dropout of each part now; backward needs what forward had."""
        return [part.dropout for part in self.parts]


def _shape(base: torch.nn.Module) -> tuple[int, int]:
    return base.out_features, base.in_features


def _quantised(base: torch.nn.Module) -> bool:
    return getattr(base.weight, "quant_state", None) is not None


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b in fp32, from 16-bit matrices on a GPU without rounding the sums."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# Differentiable steps -------------------------------------------------------------------------------------------------


@dataclass
class Norm:
    """An RMSNorm with frozen weight; `plus_one` as in kernels.rms_norm_into."""

    module: torch.nn.Module
    eps: float
    plus_one: bool

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm_into(x, self.module.weight, self.eps, self.plus_one, out)

    def backward(self, grad, x, inverse, residual) -> torch.Tensor:
        return kernels.rms_norm_backward(grad, x, self.module.weight, inverse, self.plus_one, residual)


class Linear(Function):
    """Linear layers of one group: (x, residual or None, group, its parameters) to outputs plus residual."""

    @staticmethod
    def forward(ctx, x, residual, group, *parameters):
        seeds, ctx.p = group.seeds(), group.dropouts()
        if group.rank:
            buffer = group.buffer(x.shape[0])
            buffer[:, : group.inputs].copy_(x)
        else:
            buffer = x
        y, low_rank = group.product(buffer, seeds, residual)
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
        inverse = norm.into(x, buffer[:, : group.inputs])
        y, low_rank = group.product(buffer, seeds)
        query, key, value = (y[:, part.rows].unflatten(1, (-1, size)) for part in group.parts)
        if cos is not None:
            turned = y[:, : group.parts[1].rows.stop].unflatten(1, (-1, size))
            kernels.rotate(turned, cos, sin, turned)
        ctx.save_for_backward(x, inverse, low_rank, cos, sin)
        ctx.norm, ctx.size, ctx.group, ctx.seeds = norm, size, group, seeds
        return query, key, value, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_query, d_key, d_value, residual):
        x, inverse, low_rank, cos, sin = ctx.saved_tensors
        group = ctx.group
        grad = torch.empty(x.shape[0], group.outputs, dtype=x.dtype, device=x.device)
        for source, part, turned in zip((d_query, d_key, d_value), group.parts, (True, True, False), strict=True):
            target = grad[:, part.rows].unflatten(1, (-1, ctx.size))
            if turned and cos is not None:
                kernels.rotate(source, cos, sin, target, inverse=True)
            else:
                target.copy_(source)
        if ctx.needs_input_grad[0]:
            dx, d_low_rank = group.input_grads(grad, together=True)
            group.add_input_grad(dx, d_low_rank, ctx.seeds, ctx.p)
            result, normed = ctx.norm.backward(dx, x, inverse, residual.contiguous()), dx
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
        buffer, inverse = first.buffer(x.shape[0]), None
        if norm is None:
            buffer[:, : first.inputs].copy_(x)
        else:
            inverse = norm.into(x, buffer[:, : first.inputs])
        gate_up, low_rank = first.product(buffer, ctx.seeds[0])
        del buffer
        hidden = second.buffer(x.shape[0])
        kernels.gated_into(gate_up, activation, hidden[:, : second.inputs])
        y, hidden_low_rank = second.product(hidden, ctx.seeds[1], None if norm is None else x)
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
        d_gate_up, thin = kernels.gated_backward(
            gate_up,
            d_hidden,
            ctx.activation,
            (d_hidden_low_rank[:, down.ranks], second.a[down.ranks]) if down.pair else None,
            *(low_rank[:, part.ranks] if part.pair else None for part in (gate, up)),
            dropout=(hidden_seeds[0], hidden_p[0]) if hidden_seeds is not None else None,
        )
        down_grads = second.parameter_grads([thin.down_a], second.b_grads(grad, hidden_low_rank))
        del d_hidden, d_hidden_low_rank
        dx, d_low_rank = first.input_grads(d_gate_up, together=ctx.norm is not None)
        first.add_input_grad(dx, d_low_rank, seeds, p)
        if ctx.norm is None:
            result, normed = dx, x
        else:
            result, normed = ctx.norm.backward(dx, x, inverse, grad), dx
        grads = first.parameter_grads(first.a_grads(d_low_rank, normed, seeds, p), [thin.gate_b, thin.up_b])
        return result, None, None, None, None, *grads, *down_grads


# Modules whose forward is replaced ------------------------------------------------------------------------------------


class SharedInput:
    """Forward of linear layers that are called one after the other with the same input: the first computes for all."""

    def __init__(self, group: Group):
        self.group, self.waiting = group, {}
        self.modules = [part.module for part in group.parts]
        for number, module in enumerate(self.modules):
            module.forward = partial(self.forward, number)

    def forward(self, number: int, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As the layer's own, for the layer of this number."""
        module = self.modules[number]
        if args or kwargs or x.dtype != self.group.dtype or not self.group.intact():
            return type(module).forward(module, x, *args, **kwargs)
        source, result = self.waiting.pop(number, (None, None))
        if source is not x:
            rows = x.reshape(-1, x.shape[-1])
            y = Linear.apply(rows, None, self.group, *self.group.parameters).view(*x.shape[:-1], -1)
            parts = [y[..., part.rows] for part in self.group.parts]
            result = parts[number]
            self.waiting = {i: (x, part) for i, part in enumerate(parts) if i != number}
        return result

    def detach(self) -> None:
        """Give the layers their own forward again."""
        for module in self.modules:
            del module.forward
        self.group.release()

    @property
    def groups(self) -> list[Group]:
        return [self.group]


class FoldedMLP:
    """Forward of an MLP with gate, up and down."""

    def __init__(self, mlp: torch.nn.Module, first: Group, second: Group):
        self.modules, self.groups = [mlp], [first, second]
        self.activation = _activation(mlp)
        mlp.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the MLP's own."""
        mlp, (first, second) = self.modules[0], self.groups
        if x.dtype != first.dtype or not (first.intact() and second.intact()):
            return type(mlp).forward(mlp, x)
        y = GatedMLP.apply(
            x.reshape(-1, x.shape[-1]), None, self.activation, first, second, *first.parameters, *second.parameters
        )
        return y.view(x.shape)

    def detach(self) -> None:
        """Give the MLP its own forward again."""
        del self.modules[0].forward
        for group in self.groups:
            group.release()


class FoldedLayer:
    """Forward of a decoder layer of Llama's kind: norm, attention, addition; norm, gated MLP, addition.

    `options`: what the layer tells its attention function beside queries, keys, values, mask and dropout.
    """

    def __init__(self, layer: torch.nn.Module, groups: list[Group], options: dict):
        self.layer, self.modules, self.groups = layer, [layer], groups
        attention = layer.self_attn
        self.norms = (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm))
        self.activation = _activation(layer.mlp)
        self.size = attention.head_dim
        home = sys.modules[type(attention).__module__]
        self.eager = home.eager_attention_forward
        self.rotary = home.apply_rotary_pos_emb
        # Where a norm stands between product and rotation, both are left to the model's own functions.
        self.head_norms = hasattr(attention, "q_norm") or hasattr(attention, "k_norm")
        self.options = options
        layer.forward = self.forward

    def detach(self) -> None:
        """Give the layer its own forward again."""
        del self.layer.forward
        for group in self.groups:
            group.release()

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As the layer's own, with gradient checkpointing where that is on."""
        layer = self.layer
        fits = hidden_states.dtype == self.groups[0].dtype and all(group.intact() for group in self.groups)
        if args or not fits:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            kwargs |= {"use_cache": False, "past_key_values": None}
            return layer._gradient_checkpointing_func(partial(self._run, **kwargs), hidden_states)
        return self._run(hidden_states, **kwargs)

    def _run(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        **kwargs,
    ):
        attention = self.layer.self_attn
        qkv, out, gate_up, down = self.groups
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        cos, sin = position_embeddings
        tables = (None, None) if self.head_norms else (_table(cos), _table(sin))
        *heads, residual = AttentionInput.apply(x, self.norms[0], *tables, self.size, qkv, *qkv.parameters)
        query, key, value = (y.view(*shape[:-1], -1, self.size) for y in heads)
        if self.head_norms:
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        if self.head_norms:
            query, key = self.rotary(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, self.eager)
        mixed, _ = function(
            attention,
            query,
            key,
            value,
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            **self.options | kwargs,
        )
        x = Linear.apply(mixed.reshape(-1, out.inputs), residual, out, *out.parameters)
        parameters = (*gate_up.parameters, *down.parameters)
        return GatedMLP.apply(x, self.norms[1], self.activation, gate_up, down, *parameters).view(shape)


def _table(angles: torch.Tensor) -> torch.Tensor:
    return angles.reshape(-1, angles.shape[-1]).contiguous()


def _norm(module: torch.nn.Module) -> Norm:
    """Find out by trying which RMSNorm a module is."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.requires_grad or list(module.parameters()) != [weight]:
        raise Unfit(f"norm {type(module).__name__}")
    x = _sample(4, weight.shape[0]).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = module(x)
        for plus_one in (False, True):
            found = torch.empty_like(x)
            kernels.rms_norm_into_reference(x, weight, eps, plus_one, found)
            if _agree({"": expected}, {"": found}, TOLERANCE[weight.dtype]):
                return Norm(module, eps, plus_one)
    raise Unfit(f"norm {type(module).__name__}")


def _activation(mlp: torch.nn.Module) -> str:
    """Find out by trying which activation an MLP has."""
    function = getattr(mlp, "act_fn", None)
    if function is None:
        raise Unfit("an MLP without act_fn")
    x = torch.linspace(-6, 6, 101)
    for name in kernels.ACTIVATIONS:
        if torch.allclose(function(x), kernels.activate(x, name), atol=1e-5):
            return name
    raise Unfit(f"activation {type(function).__name__}")


# Attaching ------------------------------------------------------------------------------------------------------------


def attach(model: PeftModel, hold: bool | None = None) -> dict:
    """Replace the forward of every LoRA layer of `model` that fits, and of what surrounds it; return what was done.

    `hold`: keep the 16-bit values of NF4 weights in memory; by default where they take at most HELD_SHARE of what is
    free. Each replacement has been compared with what it replaces, on random input; what disagrees stays as it was.
    The result has `decoder_layers`, `mlps`, `products` (layers, MLPs, other groups replaced), `left_to_peft` (LoRA
    layers), `held` (bool, None without NF4), `held_bytes` and `reasons` (why something did not fit, with counts).
    """
    detach(model)
    base = model.get_base_model()
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point() and not p.requires_grad)
    layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
    device = next(base.parameters()).device
    quantised = [m.get_base_layer() for m in layers if _quantised(m.get_base_layer())]
    needed = sum(m.in_features * m.out_features for m in quantised) * dtype.itemsize
    if hold is None:
        hold = needed <= HELD_SHARE * hardware.free_memory(device.type)
    workspace = None if hold else Workspace(dtype, device)
    maker = _Maker(dtype, workspace)
    flags = {module: module.training for module in base.modules()}
    base.eval()
    try:
        maker.replace(base)
    finally:
        for module, training in flags.items():
            module.training = training
    model._folded_lora = maker.done
    folded = {part.module for item in maker.done for group in item.groups for part in group.parts}
    groups = [group for item in maker.done for group in item.groups]
    return {
        "decoder_layers": sum(isinstance(item, FoldedLayer) for item in maker.done),
        "mlps": sum(isinstance(item, FoldedMLP) for item in maker.done),
        "products": sum(isinstance(item, SharedInput) for item in maker.done),
        "left_to_peft": sum(layer not in folded for layer in layers),
        "held": hold if quantised else None,
        "held_bytes": sum(group.nbytes for group in groups if group.held is not None),
        "reasons": dict(maker.reasons),
    }


def detach(model: PeftModel) -> None:
    """Undo `attach`; does nothing where nothing is attached."""
    for item in getattr(model, "_folded_lora", []):
        item.detach()
    model._folded_lora = []


def attach_where_it_pays(model: PeftModel, dtype: str) -> Choice:
    """Attach on a GPU with fast 16-bit products (Ampere or later); return the choice, with `attach`'s result."""
    if torch.cuda.get_device_capability() < (8, 0) or dtype not in {"bfloat16", "float16"}:
        return Choice("PEFT", f"folding needs a GPU of compute capability 8.0 and 16-bit products, not {dtype}")
    if kernels.triton is None:
        return Choice("PEFT", "folding needs Triton, which is not installed here")
    done = attach(model)
    if not done["decoder_layers"] + done["mlps"] + done["products"]:
        why = ", ".join(f"{reason} ({count}×)" for reason, count in done["reasons"].items())
        return Choice("PEFT", f"no layer of this model can be folded: {why}", [done])
    left = f"; {done['left_to_peft']} LoRA layers are left to PEFT" if done["left_to_peft"] else ""
    values = {None: "", True: ", NF4 values dequantised once", False: ", NF4 values dequantised in each product"}
    return Choice(
        "folded",
        f"LoRA is computed within the base products: {done['decoder_layers']} decoder layers, {done['mlps']} MLPs and "
        f"{done['products']} other products{values[done['held']]}{left}",
        [done],
    )


class _Maker:
    """Replaces what fits, the largest piece first: decoder layer, MLP, layers that share an input, single layer."""

    def __init__(self, dtype: torch.dtype, workspace: Workspace | None):
        self.dtype, self.workspace = dtype, workspace
        self.done, self.reasons = [], Counter()

    def replace(self, base: torch.nn.Module) -> None:
        for owner in list(base.modules()):
            if hasattr(owner, "rotary_emb"):
                for layer in getattr(owner, "layers", []):
                    self._try(self._layer, layer, owner.rotary_emb)
        for module in list(base.modules()):
            if _has(module, *GATED, "down_proj"):
                self._try(self._mlp, module)
        for module in list(base.modules()):
            for names in (ATTENTION, GATED):
                if _has(module, *names):
                    self._try(self._products, module, *names)
        head = base.get_output_embeddings()
        for module in list(base.modules()):
            for name, child in module.named_children():
                if isinstance(child, LoraLayer) and child is not head:
                    self._try(self._products, module, name)

    def _try(self, make, *arguments) -> None:
        """Keep what `make` replaced, or note why it could not; what is replaced already is passed over."""
        module, *names = arguments
        taken = {part.module for item in self.done for group in item.groups for part in group.parts}
        names = [name for name in names if isinstance(name, str)]
        wanted = [getattr(module, name) for name in names] if names else list(module.modules())
        adapted = [m for m in wanted if isinstance(m, LoraLayer)]
        if not adapted or any(m in taken for m in wanted):
            return
        try:
            self.done.append(make(*arguments))
        except Unfit as reason:
            self.reasons[str(reason)] += 1

    def _parts(self, parent: torch.nn.Module, *names: str) -> list[Part]:
        parts = [_part(parent, name, self.dtype) for name in names]
        if len({_shape(part.base)[1] for part in parts}) != 1:
            raise Unfit("layers with inputs of different widths")
        return parts

    def _groups(self, *lists: list[Part]) -> list[Group]:
        return [Group(parts, self.dtype, self.workspace) for parts in lists]

    def _products(self, parent: torch.nn.Module, *names: str) -> SharedInput:
        return SharedInput(*self._groups(self._parts(parent, *names)))

    def _mlp(self, mlp: torch.nn.Module) -> FoldedMLP:
        if set(dict(mlp.named_children())) - {*GATED, "down_proj", "act_fn"} or "forward" in mlp.__dict__:
            raise Unfit(f"MLP {type(mlp).__name__}")
        _activation(mlp)
        lists = [self._parts(mlp, *GATED), self._parts(mlp, "down_proj")]
        base = lists[0][0].base
        x = _sample(1, PROBE_TOKENS, base.in_features).to(base.weight.device, self.dtype)
        with torch.no_grad():
            expected = mlp(x)
            folded = FoldedMLP(mlp, *self._groups(*lists))
            self._compare(folded, {"output": expected}, {"output": mlp(x)})
        return folded

    def _layer(self, layer: torch.nn.Module, rotary: torch.nn.Module) -> FoldedLayer:
        if not _like_llama(layer):
            raise Unfit(f"layer {type(layer).__name__} is not of Llama's kind")
        attention, mlp = layer.self_attn, layer.mlp
        _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm), _activation(mlp)
        lists = [self._parts(attention, *ATTENTION), self._parts(attention, "o_proj")]
        lists += [self._parts(mlp, *GATED), self._parts(mlp, "down_proj")]
        base = lists[0][0].base
        hidden = _sample(1, PROBE_TOKENS, base.in_features).to(base.weight.device, self.dtype)
        expected = _record(layer, rotary, hidden)
        options = {name: value for name, value in expected.items() if name not in RECORDED}
        folded = FoldedLayer(layer, self._groups(*lists), options)
        try:
            found = _record(layer, rotary, hidden)
        except Unfit:
            folded.detach()
            raise
        self._compare(folded, expected, found)
        return folded

    def _compare(self, folded, expected: dict, found: dict) -> None:
        if not _agree(expected, found, TOLERANCE[self.dtype]):
            folded.detach()
            raise Unfit(f"{type(folded.modules[0]).__name__} computes something else")


def _sample(*shape: int) -> torch.Tensor:
    """Normal numbers that leave torch's generator, which training draws from, as it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _has(module: torch.nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _like_llama(layer: torch.nn.Module) -> bool:
    """Whether a decoder layer has the parts of Llama's (queries and keys may have norms), and no others."""
    if set(dict(layer.named_children())) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    home = sys.modules[type(attention).__module__]
    return (
        "forward" not in layer.__dict__
        and _has(attention, *ATTENTION, "o_proj", "head_dim", "attention_dropout", "layer_idx", "config")
        and not set(dict(attention.named_children())) - {*ATTENTION, "o_proj", "q_norm", "k_norm"}
        and hasattr(attention, "q_norm") == hasattr(attention, "k_norm")
        and _has(mlp, *GATED, "down_proj")
        and not set(dict(mlp.named_children())) - {*GATED, "down_proj", "act_fn"}
        and _has(home, "eager_attention_forward", "apply_rotary_pos_emb")
    )


@torch.no_grad()
def _record(layer: torch.nn.Module, rotary: torch.nn.Module, hidden: torch.Tensor) -> dict:
    """Run a decoder layer on `hidden`; return all that its attention function was given, and the layer's change."""
    positions = torch.arange(5, 5 + hidden.shape[1], device=hidden.device)[None]
    seen = {}

    def recorder(module, query, key, value, attention_mask, **options):
        # What the caller of the layer passes through is no property of the layer.
        options = {name: option for name, option in options.items() if name not in {"use_cache", "position_ids"}}
        seen.update(options, query=query, key=key, value=value, mask=attention_mask)
        mixed = query + value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register(RECORDER, recorder)
    config = layer.self_attn.config
    usual = config._attn_implementation
    config._attn_implementation = RECORDER
    try:
        embeddings = rotary(hidden, position_ids=positions)
        out = layer(hidden, attention_mask=None, position_embeddings=embeddings, position_ids=positions)
        return seen | {"change": out - hidden}
    except Exception as error:  # whatever a layer of another kind makes of such a call
        raise Unfit(f"layer {type(layer).__name__} is called in another way") from error
    finally:
        config._attn_implementation = usual


def _agree(a: dict, b: dict, tolerance: float) -> bool:
    if a.keys() != b.keys():
        return False
    for name, value in a.items():
        other = b[name]
        if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
            if value is not other and value != other:
                return False
        elif value.shape != other.shape:
            return False
        elif not (value.float() - other.float()).norm() <= tolerance * value.float().norm():
            return False
    return True
