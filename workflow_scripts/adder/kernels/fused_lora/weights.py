"""The matrices of fused LoRA: [W | s·B] of linear layers that share an input, held, dequantised or in fp8.

For a frozen weight W (outputs, inputs) with LoRA's A (rank, inputs), B (outputs, rank) and scaling s (Hu et al. 2021,
arXiv:2106.09685), PEFT computes x·Wᵀ + s·(x·Aᵀ)·Bᵀ in five steps over matrices as large as the output. Here the matrix
[W | s·B] is kept, and activations are written as [x | x·Aᵀ], so that
- forward is the one matmul [x | x·Aᵀ] · [W | s·B]ᵀ;
- backward to the input is the one matmul dy · [W | s·B], which yields dx and d(x·Aᵀ); what is left is low-rank.
PEFT's fp32 parameters stay what the optimizer steps; [.. | s·B] follows them whenever they have changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from adder.kernels import fp8
from adder.kernels.dropout import add_dropout_matmul_grad_x, dropout_matmul, dropout_matmul_grad_a
from adder.kernels.nf4 import dequantise_into
from adder.kernels.triton_utils import matmul_fp32

# A module of a model of any family, by PEFT or not: which attributes it has is only known when it is looked at.
AnyModule: TypeAlias = Any

# Rows of matrices begin at multiples of this many elements, 256 bytes in 16 bit: half a per cent of a step on an H100
# against 64 elements.
ROW_MULTIPLE = 128
# A matmul over columns that 8 does not divide falls back to slower kernels.
RANK_MULTIPLE = 8

# Steps of any optimizer in this process: torch's fused ones change parameters without raising their version.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class CannotFuse(Exception):
    """A module is not of a kind into which LoRA can be fused; the message says why."""


@dataclass
class LinearPart:
    """One linear layer of a group: PEFT's wrapper or a bare layer, and its place in the group's matrices."""

    parent: AnyModule
    name: str
    module: AnyModule
    base: AnyModule
    adapter: str | None
    rows: slice = field(default_factory=lambda: slice(0, 0))
    ranks: slice = field(default_factory=lambda: slice(0, 0))

    def __post_init__(self) -> None:
        # Found once: every step asks for the parameters some twenty times, and small models wait for Python.
        layers = (self.module.lora_A, self.module.lora_B) if self.adapter else ()
        self.layers: list[AnyModule] = [of_adapters[self.adapter] for of_adapters in layers]

    @property
    def lora_weights(self) -> list[torch.nn.Parameter]:
        """A and B, or nothing."""
        return [layer.weight for layer in self.layers]

    @property
    def scaling(self) -> float:
        """What PEFT multiplies B·A by."""
        return self.module.scaling[self.adapter]

    @property
    def dropout(self) -> float:
        """Probability with which the adapter's input is dropped now."""
        layer = self.module.lora_dropout[self.adapter] if self.adapter else None
        return layer.p if isinstance(layer, torch.nn.Dropout) and layer.training else 0.0

    def is_intact(self) -> bool:
        """Whether the model still asks for what was fused: not merged, switched off, exchanged or hooked."""
        module = self.module
        if getattr(self.parent, self.name) is not module or module._forward_hooks or module._forward_pre_hooks:
            return False
        if self.adapter is None:
            return True
        return not module.disable_adapters and not module.merged and module.active_adapters == [self.adapter]


def linear_part(parent: AnyModule, name: str, dtype: torch.dtype) -> LinearPart:
    """Look at a linear layer and its adapter; raise CannotFuse where they aren't plain."""
    from peft.tuners.lora import LoraLayer  # which takes seconds, and evaluation needs none of it

    module: AnyModule = getattr(parent, name)
    base, adapter, has_lora = module, None, isinstance(module, LoraLayer)
    if has_lora:
        base = module.base_layer
        if type(module).__name__ not in {"Linear", "Linear4bit"} or getattr(module, "fan_in_fan_out", False):
            raise CannotFuse(f"PEFT layer {type(module).__name__}")
        present = [name for name in module.active_adapters if name in module.lora_A]
        if module.active_adapters != present or len(present) != 1:
            raise CannotFuse("not one active adapter")
        adapter = present[0]
        if adapter in module.lora_variant or module.lora_bias.get(adapter):
            raise CannotFuse("a LoRA variant")
        if not isinstance(module.lora_dropout[adapter], torch.nn.Dropout | torch.nn.Identity):
            raise CannotFuse("an unknown dropout")
    four_bit = type(base).__name__ == "Linear4bit" and is_4bit(base)
    if not four_bit and type(base) is not torch.nn.Linear:
        raise CannotFuse(f"base layer {type(base).__name__}")
    if not four_bit and base.weight.dtype != dtype:
        raise CannotFuse(f"base weights in {base.weight.dtype}")
    if any(parameter.requires_grad for parameter in base.parameters()):
        raise CannotFuse("base weights that are trained")
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        raise CannotFuse("a forward that another library has replaced")
    return LinearPart(parent, name, module, base, adapter)


class Workspace:
    """Memory for one group's matrix at a time, for NF4 weights whose dequantised values are not held."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.elements = dtype, device, 0
        self.memory: torch.Tensor | None = None
        self.fp8 = fp8.Fp8Memory(dtype, device)

    def reserve(self, elements: int) -> None:
        """Make room for at least this many elements."""
        self.elements = max(self.elements, elements)

    def take(self, rows: int, stride: int) -> torch.Tensor:
        """A matrix (rows, stride), whose contents last until the next one is taken."""
        if self.memory is None or self.memory.numel() < self.elements:
            self.memory = torch.zeros(self.elements, dtype=self.dtype, device=self.device)
        return self.memory[: rows * stride].view(rows, stride)


class LinearGroup:
    """Frozen linear layers over one input, with their LoRA, as the matmul with [W | s·B].

    Sizes: `inputs`; `outputs`, all layers' together; `rank`, all layers' together, rounded up with columns of zeros;
    `width` = inputs + rank. B is block-diagonal: the rows of one layer are zero in the columns of another's ranks.
    After `use_fp8` the matmul with W is in fp8, and LoRA's is added in 16 bits.
    """

    def __init__(self, parts: list[LinearPart], dtype: torch.dtype, workspace: Workspace | None):
        self.parts, self.dtype = parts, dtype
        sizes = [out_in_features(part.base) for part in parts]
        self.inputs = sizes[0][1]
        self.outputs = rank = 0
        for part, (outputs, _) in zip(parts, sizes, strict=True):
            part.rows = slice(self.outputs, self.outputs + outputs)
            part.ranks = slice(rank, rank + (part.lora_weights[0].shape[0] if part.layers else 0))
            self.outputs, rank = part.rows.stop, part.ranks.stop
        self.rank = _round_up(rank, RANK_MULTIPLE)
        self.width = self.inputs + self.rank
        self.stride = _round_up(self.width, ROW_MULTIPLE)
        device = parts[0].base.weight.device
        self.a = torch.zeros(self.rank, self.inputs, dtype=dtype, device=device)
        self.bias = self._bias(device)
        self.workspace = workspace if all(is_4bit(part.base) for part in parts) else None
        self.synced_state: list[Any] | None = None
        self.fp8: fp8.Fp8Weight | fp8.UnpackedFp8Weight | None = None
        self.suspended = False  # while it is, PEFT's own layers compute
        self.held: torch.Tensor | None = None
        if self.workspace is None:
            held = torch.zeros(self.outputs, self.stride, dtype=dtype, device=device)[:, : self.width]
            self._fill(held)
            self.b = held[:, self.inputs :]
            for part in parts:
                if not is_4bit(part.base):  # PEFT's own layer reads the same memory
                    part.base.weight.data = held[part.rows, : self.inputs]
            self.held = held
        else:
            self.workspace.reserve(self.outputs * self.stride)
            self.b = torch.zeros(self.outputs, self.rank, dtype=dtype, device=device)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of every layer, in the order in which `parameter_grads` returns gradients."""
        return [parameter for part in self.parts for parameter in part.lora_weights]

    @property
    def nbytes(self) -> int:
        """Bytes that are held of [W | s·B], or of W in fp8."""
        if self.fp8 is not None:
            return self.fp8.nbytes
        return 0 if self.held is None else self.outputs * self.stride * self.dtype.itemsize

    def use_fp8(self) -> bool:
        """Hold W in fp8 in place of 16 bit; return False, and do nothing, where the sizes don't suit fp8 matmuls.

        NF4 weights that are unpacked in each matmul stay NF4, and go to fp8 in memory that all groups share.
        """
        if self.inputs % fp8.SIZE_MULTIPLE or self.outputs % fp8.SIZE_MULTIPLE:
            return False
        if self.workspace is not None:
            self.workspace.fp8.reserve(self.outputs, self.inputs)
            self.fp8 = fp8.UnpackedFp8Weight(self._unpacked, self.workspace.fp8)
            return True
        self.fp8 = fp8.Fp8Weight(self.weight_matrix()[:, : self.inputs])
        if self.held is not None:
            self.release()
            self.held, self.b = None, self.b.contiguous()
        return True

    def release(self) -> None:
        """Give the layers weights of their own again."""
        if self.held is None:
            return
        for part in self.parts:
            if not is_4bit(part.base):
                part.base.weight.data = part.base.weight.data.contiguous()

    def is_intact(self) -> bool:
        """Whether every layer still is what was fused."""
        return not self.suspended and all(part.is_intact() for part in self.parts)

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
            if is_4bit(part.base):
                dequantise_into(weight.data, weight.quant_state, target)
            else:
                target.copy_(weight.data)

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy A and s·B out of the parameters if these have changed since."""
        state: list[Any] = [_optimizer_steps, *((p.data_ptr(), p._version) for p in self.parameters)]
        state += [part.scaling for part in self.parts if part.layers]
        if state == self.synced_state:
            return
        for part in self.parts:
            if part.layers:
                a, b = part.lora_weights
                self.a[part.ranks].copy_(a)
                torch.mul(b, part.scaling, out=self.b[part.rows, part.ranks])
        self.synced_state = state

    def weight_matrix(self) -> torch.Tensor:
        """[W | s·B], (outputs, width), strided; in a workspace it lasts until the next group's."""
        if self.held is not None:
            return self.held
        matrix = self._unpacked_with_room()
        matrix[:, self.inputs :].copy_(self.b)
        return matrix

    def _unpacked(self) -> torch.Tensor:
        """W, (outputs, inputs), strided, in the workspace."""
        return self._unpacked_with_room()[:, : self.inputs]

    def _unpacked_with_room(self) -> torch.Tensor:
        """[W | ?] in the workspace."""
        assert self.workspace is not None, "weights are either held or dequantised into a workspace"
        matrix = self.workspace.take(self.outputs, self.stride)[:, : self.width]
        self._fill(matrix)
        return matrix

    def buffer(self, tokens: int) -> torch.Tensor:
        """Memory for [x | x·Aᵀ], (tokens, width), strided; its first `inputs` columns are the caller's to fill."""
        memory = torch.empty(tokens, self.stride, dtype=self.dtype, device=self.a.device)
        if memory.device.type == "cpu":
            # oneDNN's bf16 matmul (AMX) reads a row on to its next block of columns: NaN there would come out as NaN.
            memory[:, self.inputs :] = 0
        return memory[:, : self.width]

    def low_rank_into(self, x: torch.Tensor, seeds: list[int] | None, out: torch.Tensor) -> None:
        """Write x·Aᵀ into `out`, (tokens, rank), both strided; with dropout by `seeds`."""
        self.sync_weights()
        if seeds is not None:
            out.zero_()
            for part, seed in zip(self.parts, seeds, strict=True):
                if part.layers:
                    dropout_matmul(x, self.a[part.ranks], seed, part.dropout, out[:, part.ranks])
        elif self.rank:
            torch.mm(x, self.a.t(), out=out)

    def forward_from_buffer(
        self,
        buffer: torch.Tensor,
        seeds: list[int] | None,
        residual: torch.Tensor | None = None,
        x_fp8: fp8.RowwiseFp8 | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From [x | ?] return the layers' outputs, (tokens, outputs), plus `residual`; and x·Aᵀ, (tokens, rank).

        `x_fp8`: x in fp8, if it is known already.
        """
        if self.fp8 is not None:
            y, low_rank = self.base_forward(buffer, seeds, x_fp8)
            fp8.add_lora(y, low_rank, self.b, residual, self.bias)
            return y, low_rank
        low_rank = buffer[:, self.inputs :]
        self.low_rank_into(buffer[:, : self.inputs], seeds, low_rank)
        matrix = self.weight_matrix().t()
        if residual is not None:
            y = torch.addmm(residual, buffer, matrix)
            y = y if self.bias is None else y.add_(self.bias)
        elif self.bias is not None:
            y = torch.addmm(self.bias, buffer, matrix)
        else:
            y = torch.mm(buffer, matrix)
        return y, low_rank.contiguous()

    def forward(
        self, x: torch.Tensor, seeds: list[int] | None, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward_from_buffer, from x, (tokens, inputs), in memory of its own."""
        if self.fp8 is not None:
            low_rank = torch.empty(x.shape[0], self.rank, dtype=x.dtype, device=x.device)
            self.low_rank_into(x, seeds, low_rank)
            return self.forward_fp8(fp8.quantise(x), low_rank, residual), low_rank
        if not self.rank:
            return self.forward_from_buffer(x, seeds, residual)
        buffer = self.buffer(x.shape[0])
        buffer[:, : self.inputs].copy_(x)
        return self.forward_from_buffer(buffer, seeds, residual)

    def base_forward(
        self, buffer: torch.Tensor, seeds: list[int] | None, x_fp8: fp8.RowwiseFp8 | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward_from_buffer, in fp8, without LoRA and the bias, which are deferred to who reads the outputs."""
        assert self.fp8 is not None
        x = buffer[:, : self.inputs]
        self.low_rank_into(x, seeds, buffer[:, self.inputs :])
        y = fp8.matmul(x_fp8 or fp8.quantise(x), self.fp8.forward, self.dtype)
        return y, buffer[:, self.inputs :].contiguous()

    def forward_fp8(self, x_fp8: fp8.RowwiseFp8, low_rank: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """As forward_from_buffer, from x in fp8 and x·Aᵀ, (tokens, rank)."""
        assert self.fp8 is not None
        y = fp8.matmul(x_fp8, self.fp8.forward, self.dtype)
        fp8.add_lora(y, low_rank, self.b, residual, self.bias)
        return y

    def input_grads(
        self,
        grad: torch.Tensor,
        joint_matmul: bool,
        grad_fp8: fp8.RowwiseFp8 | None = None,
        amax: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the outputs' gradient return dx, (tokens, inputs), without LoRA's part of it, and d(x·Aᵀ).

        `joint_matmul`: by one matmul, both strided; else dx is contiguous, as it always is in fp8. `grad_fp8`: the
        gradient in fp8, or `amax`, of each row the largest absolute value: if these are known already.
        """
        if self.fp8 is not None:
            if amax is not None:
                grad_fp8, d_low_rank = fp8.quantise_and_matmul(grad, amax, self.b)
            else:
                grad_fp8, d_low_rank = grad_fp8 or fp8.quantise_cached(grad), self.low_rank_grad(grad)
            return fp8.matmul(grad_fp8, self.fp8.backward, self.dtype), d_low_rank
        if joint_matmul:
            both = torch.empty(grad.shape[0], self.stride, dtype=grad.dtype, device=grad.device)[:, : self.width]
            torch.mm(grad, self.weight_matrix(), out=both)
            return both[:, : self.inputs], both[:, self.inputs :]
        return torch.mm(grad, self.weight_matrix()[:, : self.inputs]), self.low_rank_grad(grad)

    def low_rank_grad(self, grad: torch.Tensor) -> torch.Tensor:
        """d(x·Aᵀ) alone, (tokens, rank)."""
        return torch.mm(grad, self.b)

    def add_input_grad(
        self, dx: torch.Tensor, d_low_rank: torch.Tensor, seeds: list[int] | None, p: list[float]
    ) -> None:
        """Add LoRA's part to dx in place."""
        if seeds is None and self.rank:
            dx.addmm_(d_low_rank, self.a)
        for part, seed, drop in zip(self.parts, seeds or [], p, strict=False):
            if part.layers:
                add_dropout_matmul_grad_x(dx, d_low_rank[:, part.ranks], self.a[part.ranks], seed, drop)

    def a_grads(
        self, d_low_rank: torch.Tensor, x: torch.Tensor, seeds: list[int] | None, p: list[float]
    ) -> list[torch.Tensor | None]:
        """Gradient of each part's A, fp32. d_low_rank: gradient to x·Aᵀ, (tokens, rank)."""
        if seeds is None:
            joint = matmul_fp32(d_low_rank.t(), x) if self.rank else None
            return [joint[part.ranks] if joint is not None and part.layers else None for part in self.parts]
        return [
            dropout_matmul_grad_a(d_low_rank[:, part.ranks], x, seed, drop) if part.layers else None
            for part, seed, drop in zip(self.parts, seeds, p, strict=True)
        ]

    def b_grads(self, grad: torch.Tensor, low_rank: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradient of each part's s·B, fp32. grad: of the outputs; low_rank: x·Aᵀ."""
        # One matmul for all, of whose blocks those on the diagonal count: reading `grad` is what takes the time.
        joint = matmul_fp32(grad.t(), low_rank) if self.rank else None
        return [joint[part.rows, part.ranks] if joint is not None and part.layers else None for part in self.parts]

    def parameter_grads(
        self, a_grads: Sequence[torch.Tensor | None], b_grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Gradients of `parameters` from those of A and s·B, both None where a layer has no LoRA."""
        grads: list[torch.Tensor] = []
        for part, grad_a, grad_b in zip(self.parts, a_grads, b_grads, strict=True):
            if grad_a is not None and grad_b is not None:
                a, b = part.lora_weights
                grads += [grad_a.to(a.dtype), (grad_b * part.scaling).to(b.dtype)]
        return grads

    def dropouts(self) -> list[float]:
        """Dropout of each part now; backward needs what forward had."""
        return [part.dropout for part in self.parts]


def out_in_features(base: AnyModule) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    return base.out_features, base.in_features


def is_4bit(base: AnyModule) -> bool:
    """Whether a linear layer holds NF4 (or FP4) weights."""
    return getattr(base.weight, "quant_state", None) is not None


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
