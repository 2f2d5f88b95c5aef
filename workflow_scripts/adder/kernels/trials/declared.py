"""Every family of kernels, declared for its trial: where it can be used, on what it is tried, how far it may be off.

Cases have few rows and the model's full widths. Tensors are made anew by each run where a kernel writes in place.
Tolerances are relative norms. One value in bf16 is rounded by at most 2^-9 = 0.002 of itself, in fp16 by an eighth.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch

from adder.kernels import (
    decode_attention,
    dropout,
    fp8,
    lm_head_loss,
    nf4,
    packed_attention,
    rmsnorm,
    rope,
    row_argmax,
    swiglu,
)
from adder.kernels.fused_lora.autograd_functions import FrozenRMSNorm, LoraSwiGLU
from adder.kernels.fused_lora.weights import LinearGroup, LinearPart
from adder.kernels.trials.shapes import ModelShapes
from adder.kernels.trials.trial import Case, KernelFamily
from adder.kernels.triton_utils import INTERPRETED, triton

ROWS = 2048  # tokens of a case: enough to fill a card, as packs do
MANY = 8192  # where speed alone decides, as it does of fp8: some kernels there fill a card later
FEW = 256  # where a row is as wide as a vocabulary, or a matrix is read for few rows
TIMED_PACK = [90] * 24  # examples' lengths in the pack that attention is timed on
GAP = 128  # elements that rows lie further apart than they are long, where kernels take strided ones
SEED = 20
ROUNDED = "both round to 16 bits, some values differently"
REROUNDED = "several matmuls in a row round to 16 bits, in another order of sums"
TORCH = "torch's own operations"
EPS = 1e-6
# Of an MLP in fp8, against 16 bits: three matmuls in a row, each off by some 3.7 % (kernels.fp8).
FP8_MLP_TOLERANCE = 0.15
# NVIDIA's first with matmuls in fp8, Ada. From there on a trial says whether torch and Triton have them.
FP8_CAPABILITY = (8, 9)
Purpose = Literal["lora", "full", "inference"]

Tensors = Sequence[torch.Tensor]


def families(purpose: Purpose) -> list[KernelFamily]:
    """The families that training with LoRA, full training or inference (evaluation) may use, in the order of trial."""
    matmuls = ("swiglu_backward", "dropout", "dropout_values", "nf4", "folded_lora", "fp8")
    names = {
        "lora": (*_ATTENTION, *ELEMENTWISE, "lm_head_loss", *matmuls),
        "full": _ATTENTION,
        "inference": (*ELEMENTWISE, "lm_head_loss", "decode_attention", "row_argmax"),
    }
    return [FAMILIES[name] for name in names[purpose]]


class _Maker:
    """Makes tensors of a case on its device, the same in each process."""

    def __init__(self, shapes: ModelShapes, device: str):
        self.dtype: torch.dtype = getattr(torch, shapes.dtype)
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, gap: int = 0) -> torch.Tensor:
        """Normal values times `scale`, in rows that lie `gap` values apart."""
        wide = torch.randn(*shape[:-1], shape[-1] + gap, generator=self.generator, device=self.device) * scale
        return wide.to(self.dtype)[..., : shape[-1]]

    def empty(self, *shape: int, gap: int = GAP) -> torch.Tensor:
        """Memory for results."""
        wide = torch.empty(*shape[:-1], shape[-1] + gap, dtype=self.dtype, device=self.device)
        return wide[..., : shape[-1]]


def _copy(x: torch.Tensor) -> torch.Tensor:
    """As x, strided alike, to be written in place."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return out.copy_(x)


def _without_triton(shapes: ModelShapes) -> str | None:
    if triton is None:
        return "Triton is not installed"
    return None if shapes.dtype in {"bfloat16", "float16"} or INTERPRETED else f"it is for 16 bits, not {shapes.dtype}"


# Attention ------------------------------------------------------------------------------------------------------------


def _attention_lacks(name: str, shapes: ModelShapes) -> str | None:
    if shapes.value_size and shapes.value_size != shapes.head_size:
        return f"the model's values are of size {shapes.value_size} and its queries of {shapes.head_size}"
    against = packed_attention.unsupported(name, shapes.head_size, shapes.cap, shapes.attention_dropout)
    return against or packed_attention.lacks(name, shapes.dtype)


def _attention(name: str, shapes: ModelShapes, device: str) -> Iterator[Case]:
    dtype = getattr(torch, shapes.dtype)
    kernel, apart = packed_attention.ATTENTION_FUNCTIONS[name], packed_attention.segment_attention
    sizes = (shapes.heads, shapes.kv_heads, shapes.head_size, shapes.cap, bool(shapes.window), dtype, device)
    for lengths in (*packed_attention.TRIAL_LENGTHS, TIMED_PACK):
        for run in packed_attention.trial_packs(*sizes, [lengths]):
            yield Case(
                f"a pack of {len(lengths)} examples",
                functools.partial(run, kernel, dtype),
                functools.partial(run, apart, torch.float32),
                functools.partial(run, apart, dtype),
                timed=lengths is TIMED_PACK,
                launched=True,
            )


# Element by element ---------------------------------------------------------------------------------------------------


def _rmsnorm(shapes: ModelShapes, device: str, with_fp8: bool = False) -> Iterator[Case]:
    make = _Maker(shapes, device)
    x, weight = make.normal(ROWS, shapes.hidden), make.normal(shapes.hidden)
    grad, residual = make.normal(ROWS, shapes.hidden, gap=GAP), make.normal(ROWS, shapes.hidden)

    for plus_one in (False, True):

        def forward(function: Callable[..., Any], plus_one: bool = plus_one) -> Tensors:
            out = make.empty(ROWS, shapes.hidden)
            rstd, in_fp8 = function(x, weight, EPS, plus_one, out, with_fp8)
            return [out, rstd, *_stands_for(in_fp8)]

        rstd = forward(rmsnorm.rms_norm_into_reference)[1]

        def backward(function: Callable[..., Any], plus_one: bool = plus_one, rstd: torch.Tensor = rstd) -> Tensors:
            given = _copy(grad)
            dx, in_fp8 = function(given, x, weight, rstd, plus_one, residual, with_fp8)
            return [dx, given, *_stands_for(in_fp8)]

        yield _case("forward", forward, rmsnorm.rms_norm_into, rmsnorm.rms_norm_into_reference)
        yield _case("backward", backward, rmsnorm.rms_norm_backward, rmsnorm.rms_norm_backward_reference)


def _stands_for(matrix: fp8.RowwiseFp8 | None) -> Tensors:
    return [] if matrix is None else [matrix.dequantised()]


def _case(name: str, run: Callable[..., Tensors], kernel: Callable[..., Any], reference: Callable[..., Any]) -> Case:
    return Case(name, functools.partial(run, kernel), functools.partial(run, reference))


def _angles(make: _Maker, rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (rows, size), both halves alike."""
    inverse = 10000.0 ** (-torch.arange(0, size // 2, device=make.device) / max(1, size // 2))
    angles = (torch.arange(rows, device=make.device)[:, None] * inverse).repeat(1, 2)
    return angles.cos().to(make.dtype), angles.sin().to(make.dtype)


def _rope(shapes: ModelShapes, device: str, with_fp8: bool = False) -> Iterator[Case]:
    make, size = _Maker(shapes, device), shapes.head_size
    heads = make.normal(ROWS, (shapes.heads + shapes.kv_heads) * size, gap=GAP)
    grads = tuple(make.normal(ROWS, count, size) for count in (shapes.heads, shapes.kv_heads, shapes.kv_heads))
    cos, sin = _angles(make, ROWS, size)

    def forward(function: Callable[..., Any]) -> Tensors:
        turned = _copy(heads)
        function(turned.unflatten(1, (-1, size)), cos, sin)
        return [turned]

    def backward(function: Callable[..., Any]) -> Tensors:
        joined, in_fp8 = function(grads, cos, sin, with_fp8)
        return [joined, *_stands_for(in_fp8)]

    if not with_fp8:
        yield _case("forward", forward, rope.apply_rope, rope.apply_rope_reference)
    yield _case("backward", backward, rope.rope_backward, rope.rope_backward_reference)


def _swiglu(shapes: ModelShapes, device: str, with_fp8: bool = False) -> Iterator[Case]:
    make = _Maker(shapes, device)
    gate_up = make.normal(ROWS, 2 * shapes.intermediate)

    def forward(function: Callable[..., Any]) -> Tensors:
        out = make.empty(ROWS, shapes.intermediate)
        return [out, *_stands_for(function(gate_up, shapes.activation, out, with_fp8))]

    yield _case("forward", forward, swiglu.swiglu_into, swiglu.swiglu_into_reference)
    grad = make.normal(ROWS, shapes.intermediate, gap=GAP)

    def backward(function: Callable[..., Any]) -> Tensors:
        return [function(gate_up, grad, shapes.activation)[0]]

    if not with_fp8:
        plain = swiglu.swiglu_backward_reference
        yield _case("backward without LoRA", backward, swiglu.swiglu_backward_alone, plain)


def _swiglu_backward(shapes: ModelShapes, device: str, deferred: bool = False) -> Iterator[Case]:
    make, width, rank = _Maker(shapes, device), shapes.intermediate, shapes.rank
    gate_up, grad = make.normal(ROWS, 2 * width), make.normal(ROWS, width, gap=GAP)
    down = (make.normal(ROWS, rank, gap=GAP), make.normal(rank, width, scale=rank**-0.5))
    low_ranks = [make.normal(ROWS, rank, gap=GAP) for _ in range(2)]
    lacking = _deferred(make, width, rank) if deferred else None
    drop = (SEED, shapes.dropout) if shapes.dropout else None

    def backward(function: Callable[..., Any]) -> Tensors:
        found, grads = function(gate_up, grad, shapes.activation, down, *low_ranks, drop, lacking)
        return [x for x in (found, grads.down_a, grads.gate_b, grads.up_b, grads.amax) if x is not None]

    yield _case("backward", backward, swiglu.swiglu_backward, swiglu.swiglu_backward_reference)


def _deferred(make: _Maker, width: int, rank: int) -> swiglu.DeferredLora:
    b = [make.normal(width, rank, scale=0.1 * rank**-0.5) for _ in range(2)]
    return swiglu.DeferredLora(b[0], b[1], None)


def _backward_lacks(shapes: ModelShapes) -> str | None:
    return _no_lora(shapes) or _no_matmuls()


def _no_matmuls() -> str | None:
    """Why Triton's matmuls aren't tried on this card."""
    if torch.version.hip or not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
        return None
    return "Triton's matmuls begin with compute capability 8.0"


def _no_lora(shapes: ModelShapes) -> str | None:
    return "there is no LoRA" if not shapes.rank else _without_triton(shapes)


# The head, dropout, NF4 -----------------------------------------------------------------------------------------------


def _lm_head_loss(shapes: ModelShapes, device: str) -> Iterator[Case]:
    make = _Maker(shapes, device)
    logits = make.normal(FEW, shapes.vocabulary, scale=3)
    target = torch.randint(shapes.vocabulary, (FEW,), generator=make.generator, device=device)

    def both(function: Callable[..., Any]) -> Tensors:
        written = logits.clone()
        return [function(written, target), written]

    yield _case("loss and gradient", both, lm_head_loss.cross_entropy_in_place, _whole_reference)


def _whole_reference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return lm_head_loss.cross_entropy_in_place_reference(logits, target)


def _dropout_lacks(shapes: ModelShapes) -> str | None:
    return _dropout_values_lacks(shapes) or _no_matmuls()


def _dropout_values_lacks(shapes: ModelShapes) -> str | None:
    return _no_lora(shapes) if shapes.dropout else "nothing is dropped"


def _dropout(shapes: ModelShapes, device: str) -> Iterator[Case]:
    make, p = _Maker(shapes, device), shapes.dropout
    for width in sorted({shapes.hidden, shapes.intermediate}):
        x, a = make.normal(ROWS, width, gap=GAP), make.normal(shapes.rank, width, scale=width**-0.5)
        grad, total = make.normal(ROWS, shapes.rank, gap=GAP), make.normal(ROWS, width, gap=GAP)

        def forward(function: Callable[..., Any], x: torch.Tensor = x, a: torch.Tensor = a) -> Tensors:
            out = make.empty(ROWS, shapes.rank)
            function(x, a, SEED, p, out)
            return [out]

        def to_a(function: Callable[..., Any], grad: torch.Tensor = grad, x: torch.Tensor = x) -> Tensors:
            return [function(grad, x, SEED, p)]

        def to_x(
            function: Callable[..., Any],
            grad: torch.Tensor = grad,
            total: torch.Tensor = total,
            a: torch.Tensor = a,
        ) -> Tensors:
            added = _copy(total)
            function(added, grad, a, SEED, p)
            return [added]

        yield _case("forward", forward, dropout.dropout_matmul, dropout.dropout_matmul_reference)
        yield _case("gradient to A", to_a, dropout.dropout_matmul_grad_a, dropout.dropout_matmul_grad_a_reference)
        yield _case(
            "gradient to x", to_x, dropout.add_dropout_matmul_grad_x, dropout.add_dropout_matmul_grad_x_reference
        )


def _dropout_values(shapes: ModelShapes, device: str) -> Iterator[Case]:
    x = _Maker(shapes, device).normal(ROWS, shapes.intermediate, gap=GAP)
    yield Case(
        "values",
        lambda: [dropout.dropped(x, SEED, shapes.dropout)],
        lambda: [dropout.dropped_reference(x, SEED, shapes.dropout)],
    )


def _nf4_lacks(shapes: ModelShapes) -> str | None:
    return _without_triton(shapes) if shapes.four_bit else "no weight is in 4 bits"


def _nf4(shapes: ModelShapes, device: str) -> Iterator[Case]:
    from bitsandbytes.functional import quantize_4bit

    make = _Maker(shapes, device)
    for outputs, inputs in ((shapes.intermediate, shapes.hidden), (shapes.hidden, shapes.intermediate)):
        weight = make.normal(outputs, inputs, scale=0.02)
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")

        def unpacked(
            function: Callable[..., Any],
            packed: torch.Tensor = packed,
            state: Any = state,
            shape: torch.Size = weight.shape,
        ) -> Tensors:
            out = make.empty(*shape)
            function(packed, state, out)
            return [out]

        yield _case("values", unpacked, nf4.dequantise_into, nf4.dequantise_into_reference)


# Folded LoRA ----------------------------------------------------------------------------------------------------------


class _Adapted:
    """A linear layer with LoRA, as far as LinearPart looks at PEFT's."""

    def __init__(self, make: _Maker, outputs: int, inputs: int, rank: int):
        def linear(rows: int, width: int, dtype: torch.dtype, trained: bool) -> torch.nn.Linear:
            layer = torch.nn.Linear(width, rows, bias=False, device="meta")
            values = make.normal(rows, width, scale=width**-0.5).to(dtype)
            layer.weight = torch.nn.Parameter(values, requires_grad=trained)
            return layer

        self.base = linear(outputs, inputs, make.dtype, trained=False)
        self.lora_A = {"default": linear(rank, inputs, torch.float32, trained=True)}
        self.lora_B = {"default": linear(outputs, rank, torch.float32, trained=True)}
        self.scaling, self.lora_dropout = {"default": 1.0}, {"default": None}

    def parameters(self) -> list[torch.Tensor]:
        """A and B."""
        return [self.lora_A["default"].weight, self.lora_B["default"].weight]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """As PEFT's layer computes it under autocast."""
        a, b = (parameter.to(x.dtype) for parameter in self.parameters())
        linear = torch.nn.functional.linear
        return linear(x, self.base.weight) + linear(linear(x, a), b)


def _group(layers: list[_Adapted], dtype: torch.dtype) -> LinearGroup:
    """The layers as one group; their weights then are parts of its matrix."""
    parent = SimpleNamespace()
    return LinearGroup([LinearPart(parent, "", layer, layer.base, "default") for layer in layers], dtype, None)


def _no_lora_at_all(shapes: ModelShapes) -> str | None:
    if not shapes.rank:
        return "there is no LoRA"
    return None if shapes.dtype in {"bfloat16", "float16"} or INTERPRETED else f"it is for 16 bits, not {shapes.dtype}"


def _folded_lora(shapes: ModelShapes, device: str, in_fp8: bool = False) -> Iterator[Case]:
    """A SwiGLU MLP with its norm: every kind of matmul that folded LoRA makes."""
    make, width = _Maker(shapes, device), shapes.intermediate
    gate, up = (_Adapted(make, width, shapes.hidden, shapes.rank) for _ in range(2))
    down = _Adapted(make, shapes.hidden, width, shapes.rank)
    gate_up_group, down_group = _group([gate, up], make.dtype), _group([down], make.dtype)
    norm = FrozenRMSNorm(SimpleNamespace(weight=make.normal(shapes.hidden)), EPS, plus_one=False)
    parameters = [*gate.parameters(), *up.parameters(), *down.parameters()]
    rows = MANY if in_fp8 else ROWS
    x, grad = make.normal(rows, shapes.hidden), make.normal(rows, shapes.hidden)

    def with_gradients(function: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            return [y, *torch.autograd.grad(y, [leaf, *parameters], grad)]

    def folded(leaf: torch.Tensor) -> torch.Tensor:
        return LoraSwiGLU.apply(leaf, norm, shapes.activation, gate_up_group, down_group, *parameters)

    def apart(leaf: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(leaf, (shapes.hidden,), norm.module.weight, EPS)
        return leaf + down(swiglu.activate(gate(normed), shapes.activation) * up(normed))

    if in_fp8:
        # The same in 16 bits is what fp8 has to be faster than; how far it may be off is base_precision's to measure.
        before = functools.partial(with_gradients, folded)
        in_16_bits = [x.detach().clone() for x in before()]
        groups = [_group([gate, up], make.dtype), _group([down], make.dtype)]
        for group in groups:
            group.use_fp8()

        def folded_fp8(leaf: torch.Tensor) -> torch.Tensor:
            return LoraSwiGLU.apply(leaf, norm, shapes.activation, *groups, *parameters)

        run = functools.partial(with_gradients, folded_fp8)
        yield Case("an MLP", run, lambda: in_16_bits, before, tolerance=FP8_MLP_TOLERANCE)
    else:
        yield Case("an MLP", functools.partial(with_gradients, folded), functools.partial(with_gradients, apart))


# fp8 ------------------------------------------------------------------------------------------------------------------


def _fp8_lacks(shapes: ModelShapes) -> str | None:
    if not shapes.fp8:
        return "no matmul is to be in fp8"
    if shapes.dtype != "bfloat16":
        return f"it needs train.compute_dtype: bfloat16, not {shapes.dtype}"
    if not torch.version.hip and torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return (
            f"the card has no fp8 matmuls, which begin with compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}"
        )
    sizes = (shapes.hidden, shapes.intermediate)
    if any(size % fp8.SIZE_MULTIPLE for size in sizes):
        return f"the model's widths {sizes} are no multiples of {fp8.SIZE_MULTIPLE}"
    return _no_lora(shapes)


def _fp8(shapes: ModelShapes, device: str) -> Iterator[Case]:
    make, hidden, rank = _Maker(shapes, device), shapes.hidden, shapes.rank
    x, weight, b = make.normal(FEW, hidden), make.normal(FEW, hidden), make.normal(hidden, rank, gap=GAP)

    def quantised(function: Callable[..., Any]) -> Tensors:
        return _stands_for(function(x))

    yield _case("quantising", quantised, fp8.quantise, fp8.quantise_reference)._replace(timed=False)
    matrices = fp8.quantise_reference(x), fp8.quantise_reference(weight)
    yield Case(
        "a matmul",
        lambda: [fp8.matmul(*matrices, make.dtype)],
        lambda: [fp8.matmul_reference(*matrices)],
        timed=False,
    )
    amax = x.float().abs().amax(-1)

    def with_matmul(function: Callable[..., Any]) -> Tensors:
        in_fp8, product = function(x, amax, b)
        return [*_stands_for(in_fp8), product]

    def plain_matmul(x: torch.Tensor, amax: torch.Tensor, b: torch.Tensor) -> tuple[fp8.RowwiseFp8, torch.Tensor]:
        return fp8.quantise_reference(x), torch.mm(x, b)

    yield _case("quantising with a matmul", with_matmul, fp8.quantise_and_matmul, plain_matmul)._replace(timed=False)
    yield from _fp8_lora(make, shapes)
    for cases in (_rmsnorm, _rope, _swiglu):
        yield from (case._replace(timed=False) for case in cases(shapes, device, True))
    yield from (case._replace(timed=False) for case in _swiglu_backward(shapes, device, True))
    yield from _folded_lora(shapes, device, in_fp8=True)


def _fp8_lora(make: _Maker, shapes: ModelShapes) -> Iterator[Case]:
    """What adds LoRA after a matmul in fp8."""
    rank, size = shapes.rank, shapes.head_size
    width = (shapes.heads + 2 * shapes.kv_heads) * size
    low_rank, b = make.normal(FEW, rank, gap=GAP), make.normal(width, rank, gap=GAP)
    y, bias, (cos, sin) = make.normal(FEW, width), make.normal(width), _angles(make, FEW, size)

    def added(function: Callable[..., Any]) -> Tensors:
        total = y.clone()
        function(total, low_rank, b, y, bias)
        return [total]

    def rotated(function: Callable[..., Any]) -> Tensors:
        total = y.clone()
        function(total, low_rank, b, bias, cos, sin, size, shapes.heads + shapes.kv_heads)
        return [total]

    yield _case("adding LoRA", added, fp8.add_lora, fp8.add_lora_reference)._replace(timed=False)
    yield _case("adding LoRA and RoPE", rotated, rope.add_lora_and_rope, rope.add_lora_and_rope_reference)._replace(
        timed=False
    )
    if rank > swiglu.MAX_FUSED_RANK:
        return
    gate_up, down_a = make.normal(FEW, 2 * shapes.intermediate), make.normal(rank, shapes.intermediate)
    low_ranks, deferred = [make.normal(FEW, rank) for _ in range(2)], _deferred(make, shapes.intermediate, rank)

    def activated(function: Callable[..., Any]) -> Tensors:
        in_fp8, product = function(gate_up, shapes.activation, *low_ranks, deferred, down_a)
        return [*_stands_for(in_fp8), product]

    yield _case("adding LoRA in an MLP", activated, swiglu.lora_swiglu_fp8, swiglu.lora_swiglu_fp8_reference)._replace(
        timed=False
    )


# Decoding -------------------------------------------------------------------------------------------------------------


def _decode_attention(shapes: ModelShapes, device: str) -> Iterator[Case]:
    make, rows, capacity, size = _Maker(shapes, device), 32, 512, shapes.head_size
    query = make.normal(rows, shapes.heads, size)
    keys, values = (make.normal(rows, shapes.kv_heads, capacity, size) for _ in range(2))
    lengths = torch.arange(1, rows + 1, device=device, dtype=torch.int32) * (capacity // rows)
    new = [make.normal(rows, shapes.kv_heads, size) for _ in range(2)]

    def attended(function: Callable[..., Any]) -> Tensors:
        return [function(query, keys, values, lengths, size**-0.5)]

    def stored(function: Callable[..., Any]) -> Tensors:
        caches = keys.clone(), values.clone()
        function(*new, lengths.long() - 1, *caches)
        return caches

    yield _case("attention", attended, decode_attention.decode_attention, decode_attention.decode_attention_reference)
    yield _case("storing", stored, decode_attention.store_token, decode_attention.store_token_reference)


def _row_argmax(shapes: ModelShapes, device: str) -> Iterator[Case]:
    logits = _Maker(shapes, device).normal(FEW, shapes.vocabulary)
    yield Case("places", lambda: [row_argmax.row_argmax(logits)], lambda: [logits.argmax(-1)])


ELEMENTWISE = ("rmsnorm", "rope", "swiglu")


def _attention_family(name: str, after: str | None) -> KernelFamily:
    return KernelFamily(
        name,
        f"attention by {name}",
        "example by example",
        packed_attention.MAX_TRIAL_ERROR,
        "16-bit kernels come to 0.003 to 0.006 of fp32's, and what sees too much or too little is off by tenths",
        functools.partial(_attention, name),
        functools.partial(_attention_lacks, name),
        after,
    )


_ATTENTION = list(packed_attention.KERNELS)
_AFTER = dict(zip(_ATTENTION, [None, *_ATTENTION], strict=False))

FAMILIES: dict[str, KernelFamily] = {
    family.name: family
    for family in (
        *(_attention_family(name, _AFTER[name]) for name in _ATTENTION),
        KernelFamily("rmsnorm", "RMSNorm", TORCH, 0.01, ROUNDED, _rmsnorm, _without_triton),
        KernelFamily("rope", "RoPE", TORCH, 0.01, ROUNDED, _rope, _without_triton),
        KernelFamily("swiglu", "the gated MLP", TORCH, 0.01, ROUNDED, _swiglu, _without_triton),
        KernelFamily(
            "swiglu_backward",
            "the gated MLP's backward",
            TORCH,
            0.02,
            REROUNDED,
            _swiglu_backward,
            _backward_lacks,
            with_lora=True,
        ),
        KernelFamily("lm_head_loss", "the head's loss", TORCH, 0.01, ROUNDED, _lm_head_loss, _without_triton),
        KernelFamily("dropout", "LoRA's dropout", TORCH, 0.02, REROUNDED, _dropout, _dropout_lacks, with_lora=True),
        KernelFamily(
            "dropout_values",
            "LoRA's dropout before torch's matmuls",
            TORCH,
            0.01,
            ROUNDED,
            _dropout_values,
            _dropout_values_lacks,
            after="dropout",
            with_lora=True,
        ),
        KernelFamily(
            "nf4", "NF4's values", "bitsandbytes", 0.005, "one rounding to 16 bits", _nf4, _nf4_lacks, with_lora=True
        ),
        KernelFamily(
            "folded_lora", "folded LoRA", "LoRA by PEFT", 0.03, REROUNDED, _folded_lora, _no_lora_at_all, with_lora=True
        ),
        KernelFamily(
            "fp8",
            "fp8",
            "16 bits",
            0.03,
            "one value in e4m3 next to another",
            _fp8,
            _fp8_lacks,
            slower=1,
            with_lora=True,
        ),
        KernelFamily(
            "decode_attention", "decoding's attention", TORCH, 0.02, REROUNDED, _decode_attention, _without_triton
        ),
        KernelFamily("row_argmax", "decoding's likeliest token", TORCH, 0, "places are equal", _row_argmax),
    )
}
