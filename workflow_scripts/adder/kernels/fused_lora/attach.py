"""LoRA fused into the base model's matmuls: training speed, not other results.

Attached to a PEFT model, it replaces the forward of what it recognises: Llama-like decoder layers, SwiGLU MLPs, linear
layers that share an input, single linear layers. PEFT's modules and fp32 parameters stay what the optimizer steps and
what is saved. What does not fit is left to PEFT. `weights` has the idea, `autograd_functions` its arithmetic, `layers`
the replacements, `layer_probes` how a module is recognised.

With precision "fp8" the matmuls with frozen weights are in fp8 (module `kernels.fp8`), which does change results;
`training.base_precision` measures by how much, and decides.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypedDict

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from adder.core import hardware
from adder.core.choice import Choice
from adder.kernels import families, fp8
from adder.kernels.fused_lora.layer_probes import (
    GATE_UP,
    PROBE_TOKENS,
    QKV,
    RECORDED,
    TOLERANCE,
    has_attributes,
    is_llama_like,
    probe_activation,
    probe_rmsnorm,
    record_layer,
    records_agree,
    sample_normal,
)
from adder.kernels.fused_lora.layers import FusedDecoderLayer, FusedLinears, FusedMLP
from adder.kernels.fused_lora.weights import (
    AnyModule,
    CannotFuse,
    LinearGroup,
    LinearPart,
    Workspace,
    is_4bit,
    linear_part,
    out_in_features,
)
from adder.kernels.triton_utils import triton

Replacement: TypeAlias = FusedDecoderLayer | FusedMLP | FusedLinears

# Share of the free memory that the values of NF4 weights may take; beyond it they are dequantised in each matmul.
HELD_SHARE = 0.4


class FusionSummary(TypedDict):
    """What `attach` has done, as plan.json has it."""

    decoder_layers: int  # replaced
    mlps: int  # replaced, outside of these layers
    products: int  # other groups of linear layers replaced
    left_to_peft: int  # LoRA layers
    fp8: int  # groups in fp8
    held: bool | None  # whether dequantised values of NF4 weights are held; None without NF4
    held_bytes: int
    reasons: dict[str, int]  # why something did not fit, how often


def attach(
    model: PeftModel, hold: bool | None = None, precision: str = "bf16", linears_only: bool = False
) -> FusionSummary:
    """Replace the forward of every LoRA layer of `model` that fits, and of what surrounds it; return what was done.

    `hold`: keep the 16-bit values of NF4 weights in memory; by default where they take at most HELD_SHARE of what is
    free. `precision`: "fp8" holds frozen weights in fp8 instead, both directions, or without `hold` takes NF4 ones to
    fp8 one after another, in memory that all share; "bf16" leaves them in the model's own 16 bits. `linears_only`:
    what surrounds LoRA's layers stays as it is. Each other replacement has been compared with what it replaces, on
    random input and with 16-bit matmuls; what disagrees stays as it was.
    """
    detach(model)
    base: AnyModule = model.get_base_model()
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point() and not p.requires_grad)
    layers = _lora_layers(base)
    device = next(base.parameters()).device
    elements = sum(m.in_features * m.out_features for m in _four_bit(layers))
    if precision == "fp8":
        hold = hold is not False
    elif hold is None:
        hold = elements * dtype.itemsize <= HELD_SHARE * hardware.free_memory(device.type)
    fuser = _Fuser(dtype, None if hold else Workspace(dtype, device), precision == "fp8")
    flags = {module: module.training for module in base.modules()}
    base.eval()
    try:
        fuser.replace(base, linears_only)
    finally:
        for module, training in flags.items():
            module.training = training
    _set_replacements(model, fuser.done)
    groups = _groups(model)
    fused = {part.module for group in groups for part in group.parts}
    return {
        "decoder_layers": sum(isinstance(item, FusedDecoderLayer) for item in fuser.done),
        "mlps": sum(isinstance(item, FusedMLP) for item in fuser.done),
        "products": sum(isinstance(item, FusedLinears) for item in fuser.done),
        "left_to_peft": sum(layer not in fused for layer in layers),
        "fp8": sum(group.fp8 is not None for group in groups),
        "held": hold if elements else None,
        "held_bytes": sum(group.nbytes for group in groups),
        "reasons": dict(fuser.reasons),
    }


def _replacements(model: PeftModel) -> list[Replacement]:
    return getattr(model, "_fused_lora", [])


def _set_replacements(model: AnyModule, replacements: list[Replacement]) -> None:
    model._fused_lora = replacements


def _groups(model: PeftModel) -> list[LinearGroup]:
    return [group for item in _replacements(model) for group in item.groups]


def _lora_layers(base: AnyModule) -> list[AnyModule]:
    return [module for module in base.modules() if isinstance(module, LoraLayer)]


def _four_bit(layers: list[AnyModule]) -> list[AnyModule]:
    return [layer.get_base_layer() for layer in layers if is_4bit(layer.get_base_layer())]


def detach(model: PeftModel) -> None:
    """Undo `attach`; does nothing where nothing is attached."""
    for item in _replacements(model):
        item.detach()
    _set_replacements(model, [])


@contextmanager
def suspended(model: PeftModel) -> Iterator[None]:
    """Within it PEFT's own layers compute; nothing is thrown away."""
    groups = _groups(model)
    for group in groups:
        group.suspended = True
    try:
        yield
    finally:
        for group in groups:
            group.suspended = False


def attach_where_it_pays(
    model: PeftModel, dtype: str, precision: str = "bf16", hold: bool | None = None
) -> Choice[str, FusionSummary]:
    """Attach on a GPU where a trial found that it pays; return the choice, with `attach`'s result.

    `precision`, `hold`: as attach's; "fp8" only where it can be had. Where nothing was tried, a GPU of compute
    capability 8.0 with Triton is taken to be good for it.
    """
    if dtype not in {"bfloat16", "float16"}:
        return Choice("PEFT", f"fused LoRA needs 16-bit matmuls, not {dtype}")
    if why := families.why_off("folded_lora"):
        return Choice("PEFT", f"LoRA isn't fused: a trial on this card {why}")
    tried = families.is_tried("folded_lora")
    if not tried and (triton is None or torch.cuda.get_device_capability() < (8, 0)):
        return Choice("PEFT", "fused LoRA needs a GPU of compute capability 8.0 and Triton, or a trial")
    return _choice(attach(model, hold, precision))


def attach_on_cpu(model: PeftModel, dtype: str) -> Choice[str, FusionSummary]:
    """Attach to the linear layers of a model on a CPU where that is right and pays; return the choice.

    In bf16 PEFT adds LoRA's output to the base's rounded one: what is below half a bit of it is lost, which is most of
    what the first steps learn. Here the sum is rounded, once: the losses are those of fp32, and a step takes a seventh
    less time (SmolLM2-135M, one core with AMX). In fp32 there is nothing to gain. Dropout stays with PEFT, since the
    mask that kernels hash is slow to make on a CPU.
    """
    layers = _lora_layers(model.get_base_model())
    if dtype != "bfloat16":
        return Choice("PEFT", f"on a CPU fused LoRA serves bf16, not {dtype}")
    if _four_bit(layers):
        return Choice("PEFT", "fused LoRA on a CPU needs room for the dequantised values of NF4 weights")
    if any(getattr(dropout, "p", 0) for layer in layers for dropout in layer.lora_dropout.values()):
        return Choice("PEFT", "on a CPU PEFT's dropout is the fast one")
    return _choice(attach(model, linears_only=True))


def _choice(done: FusionSummary) -> Choice[str, FusionSummary]:
    if not done["decoder_layers"] + done["mlps"] + done["products"]:
        why = ", ".join(f"{reason} ({count}×)" for reason, count in done["reasons"].items())
        return Choice("PEFT", f"LoRA can be fused into no layer of this model: {why}", [done])
    # "folded" is what plan.json has always said.
    return Choice("folded, fp8" if done["fp8"] else "folded", _sentence(done), [done])


def _sentence(done: FusionSummary) -> str:
    left = f"; {done['left_to_peft']} LoRA layers are left to PEFT" if done["left_to_peft"] else ""
    values = {None: "", True: ", NF4 values dequantised once", False: ", NF4 values dequantised in each matmul"}
    shared = ", of NF4 weights that are taken to fp8 one at a time" if done["held"] is False else ""
    how = f", {done['fp8']} of their matmuls in fp8{shared}" if done["fp8"] else values[done["held"]]
    return (
        f"LoRA is fused into the base's matmuls: {done['decoder_layers']} decoder layers, {done['mlps']} MLPs and "
        f"{done['products']} other groups of linear layers{how}{left}"
    )


class _Fuser:
    """Replaces what fits, the largest piece first: decoder layer, MLP, layers that share an input, single layer."""

    def __init__(self, dtype: torch.dtype, workspace: Workspace | None, in_fp8: bool):
        self.dtype, self.workspace, self.in_fp8 = dtype, workspace, in_fp8
        self.done: list[Replacement] = []
        self.reasons: Counter[str] = Counter()

    def replace(self, base: AnyModule, linears_only: bool) -> None:
        """Replace what fits in the model; `done` holds the replacements, `reasons` why others are missing."""
        if not linears_only:
            self._replace_surroundings(base)
        for module in list(base.modules()):
            for names in (QKV, GATE_UP):
                if has_attributes(module, *names):
                    self._try(self._linears, module, *names)
        head = base.get_output_embeddings()
        for module in list(base.modules()):
            for name, child in module.named_children():
                if isinstance(child, LoraLayer) and child is not head:
                    self._try(self._linears, module, name)

    def _replace_surroundings(self, base: AnyModule) -> None:
        for owner in list(base.modules()):
            if hasattr(owner, "rotary_emb"):
                for layer in getattr(owner, "layers", []):
                    self._try(self._layer, layer, owner.rotary_emb)
        for module in list(base.modules()):
            if has_attributes(module, *GATE_UP, "down_proj"):
                self._try(self._mlp, module)

    def _try(self, make: Callable[..., Replacement], module: AnyModule, *arguments: Any) -> None:
        """Keep what `make` replaced, or note why it could not; what is replaced already is passed over."""
        taken = {part.module for item in self.done for group in item.groups for part in group.parts}
        names = [name for name in arguments if isinstance(name, str)]
        wanted = [getattr(module, name) for name in names] if names else list(module.modules())
        adapted = [m for m in wanted if isinstance(m, LoraLayer)]
        if not adapted or any(m in taken for m in wanted):
            return
        try:
            item = make(module, *arguments)
        except CannotFuse as reason:
            self.reasons[str(reason)] += 1
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # of kernels and libraries, which raise what they like
            self.reasons[f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"] += 1
            return
        self.done.append(item)
        if self.in_fp8:  # only now: what was compared above has 16-bit matmuls' exactness
            for group in item.groups:
                if not group.use_fp8():
                    self.reasons[f"fp8 matmuls need sizes that {fp8.SIZE_MULTIPLE} divides"] += 1

    def _parts(self, parent: AnyModule, *names: str) -> list[LinearPart]:
        parts = [linear_part(parent, name, self.dtype) for name in names]
        if len({out_in_features(part.base)[1] for part in parts}) != 1:
            raise CannotFuse("layers with inputs of different widths")
        return parts

    def _groups(self, *lists: list[LinearPart]) -> list[LinearGroup]:
        return [LinearGroup(parts, self.dtype, self.workspace) for parts in lists]

    def _linears(self, parent: AnyModule, *names: str) -> FusedLinears:
        return FusedLinears(*self._groups(self._parts(parent, *names)))

    def _mlp(self, mlp: AnyModule) -> FusedMLP:
        if set(dict(mlp.named_children())) - {*GATE_UP, "down_proj", "act_fn"} or "forward" in mlp.__dict__:
            raise CannotFuse(f"MLP {type(mlp).__name__}")
        probe_activation(mlp)
        lists = [self._parts(mlp, *GATE_UP), self._parts(mlp, "down_proj")]
        base = lists[0][0].base
        x = sample_normal(1, PROBE_TOKENS, base.in_features).to(base.weight.device, self.dtype)
        with torch.no_grad():
            expected = mlp(x)
            fused = FusedMLP(mlp, *self._groups(*lists))
            try:
                found = mlp(x)
            except Exception:
                fused.detach()
                raise
            self._compare(fused, {"output": expected}, {"output": found})
        return fused

    def _layer(self, layer: AnyModule, rotary: AnyModule) -> FusedDecoderLayer:
        if not is_llama_like(layer):
            raise CannotFuse(f"layer {type(layer).__name__} is not like Llama's")
        attention, mlp = layer.self_attn, layer.mlp
        probe_rmsnorm(layer.input_layernorm)
        probe_rmsnorm(layer.post_attention_layernorm)
        probe_activation(mlp)
        lists = [self._parts(attention, *QKV), self._parts(attention, "o_proj")]
        lists += [self._parts(mlp, *GATE_UP), self._parts(mlp, "down_proj")]
        base = lists[0][0].base
        hidden = sample_normal(1, PROBE_TOKENS, base.in_features).to(base.weight.device, self.dtype)
        expected = record_layer(layer, rotary, hidden)
        options = {name: value for name, value in expected.items() if name not in RECORDED}
        fused = FusedDecoderLayer(layer, self._groups(*lists), options)
        try:
            found = record_layer(layer, rotary, hidden)
        except CannotFuse:
            fused.detach()
            raise
        self._compare(fused, expected, found)
        return fused

    def _compare(self, fused: Replacement, expected: dict[str, Any], found: dict[str, Any]) -> None:
        if not records_agree(expected, found, TOLERANCE[self.dtype]):
            fused.detach()
            raise CannotFuse(f"{type(fused.modules[0]).__name__} computes something else")
