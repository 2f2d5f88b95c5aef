"""LoRA folded into the base model's products: training speed, not other numbers.

Attached to a PEFT model, it replaces the forward of what it recognises: whole decoder layers of Llama's kind, gated
MLPs, layers that share an input, single linear layers. PEFT's modules and fp32 parameters stay what the optimizer
steps and what is saved. What does not fit is left to PEFT. `folded_weights` has the idea, `folded_steps` its
arithmetic, `folded_layers` the replacements, `layer_probes` how a module is recognised.

With products "fp8" the frozen weights' products are in fp8 (module `fp8`), which does change numbers; `frozen_products`
measures by how much, and decides.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from adder.core import hardware
from adder.core.choice import Choice
from adder.kernels import fp8
from adder.kernels.fused_lora.layer_probes import (
    ATTENTION,
    GATED,
    PROBE_TOKENS,
    RECORDED,
    TOLERANCE,
    activation_of,
    agree,
    has,
    like_llama,
    norm_of,
    record,
    sample,
)
from adder.kernels.fused_lora.layers import FoldedLayer, FoldedMLP, SharedInput
from adder.kernels.fused_lora.weights import Group, Part, Unfit, Workspace, part_of, quantised, shape_of
from adder.kernels.triton_utils import triton

# Share of the free memory that the values of NF4 weights may take; beyond it they are dequantised in each product.
HELD_SHARE = 0.4


def attach(model: PeftModel, hold: bool | None = None, products: str = "bf16") -> dict:
    """Replace the forward of every LoRA layer of `model` that fits, and of what surrounds it; return what was done.

    `hold`: keep the 16-bit values of NF4 weights in memory; by default where they take at most HELD_SHARE of what is
    free. `products`: "fp8" holds frozen weights in fp8 instead, both directions; "bf16" leaves them in the model's own
    16 bits. Each replacement has been compared with what it replaces, on random input and with 16-bit products; what
    disagrees stays as it was. The result has `decoder_layers`, `mlps`, `products` (layers, MLPs, other groups
    replaced), `left_to_peft` (LoRA layers), `fp8` (groups in fp8), `held` (bool, None without NF4), `held_bytes` and
    `reasons` (why something did not fit, with counts).
    """
    detach(model)
    base = model.get_base_model()
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point() and not p.requires_grad)
    layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
    device = next(base.parameters()).device
    numbers = sum(m.in_features * m.out_features for m in _four_bit(layers))
    if products == "fp8":
        hold = True
    elif hold is None:
        hold = numbers * dtype.itemsize <= HELD_SHARE * hardware.free_memory(device.type)
    maker = _Maker(dtype, None if hold else Workspace(dtype, device), products == "fp8")
    flags = {module: module.training for module in base.modules()}
    base.eval()
    try:
        maker.replace(base)
    finally:
        for module, training in flags.items():
            module.training = training
    model._folded_lora = maker.done
    groups = _groups(model)
    folded = {part.module for group in groups for part in group.parts}
    return {
        "decoder_layers": sum(isinstance(item, FoldedLayer) for item in maker.done),
        "mlps": sum(isinstance(item, FoldedMLP) for item in maker.done),
        "products": sum(isinstance(item, SharedInput) for item in maker.done),
        "left_to_peft": sum(layer not in folded for layer in layers),
        "fp8": sum(group.fp8 is not None for group in groups),
        "held": hold if numbers else None,
        "held_bytes": sum(group.nbytes for group in groups),
        "reasons": dict(maker.reasons),
    }


def _groups(model: PeftModel) -> list[Group]:
    return [group for item in getattr(model, "_folded_lora", []) for group in item.groups]


def _four_bit(layers: list[LoraLayer]) -> list[torch.nn.Module]:
    return [layer.get_base_layer() for layer in layers if quantised(layer.get_base_layer())]


def detach(model: PeftModel) -> None:
    """Undo `attach`; does nothing where nothing is attached."""
    for item in getattr(model, "_folded_lora", []):
        item.detach()
    model._folded_lora = []


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


def attach_where_it_pays(model: PeftModel, dtype: str, products: str = "bf16") -> Choice:
    """Attach on a GPU with fast 16-bit products (Ampere or later); return the choice, with `attach`'s result.

    `products`: as attach's; "fp8" only where it can be had.
    """
    if torch.cuda.get_device_capability() < (8, 0) or dtype not in {"bfloat16", "float16"}:
        return Choice("PEFT", f"folding needs a GPU of compute capability 8.0 and 16-bit products, not {dtype}")
    if triton is None:
        return Choice("PEFT", "folding needs Triton, which is not installed here")
    done = attach(model, products=products)
    if not done["decoder_layers"] + done["mlps"] + done["products"]:
        why = ", ".join(f"{reason} ({count}×)" for reason, count in done["reasons"].items())
        return Choice("PEFT", f"no layer of this model can be folded: {why}", [done])
    return Choice("folded, fp8" if done["fp8"] else "folded", _sentence(done), [done])


def _sentence(done: dict) -> str:
    left = f"; {done['left_to_peft']} LoRA layers are left to PEFT" if done["left_to_peft"] else ""
    values = {None: "", True: ", NF4 values dequantised once", False: ", NF4 values dequantised in each product"}
    how = f", {done['fp8']} of them in fp8" if done["fp8"] else values[done["held"]]
    return (
        f"LoRA is computed within the base products: {done['decoder_layers']} decoder layers, {done['mlps']} MLPs and "
        f"{done['products']} other products{how}{left}"
    )


class _Maker:
    """Replaces what fits, the largest piece first: decoder layer, MLP, layers that share an input, single layer."""

    def __init__(self, dtype: torch.dtype, workspace: Workspace | None, in_fp8: bool):
        self.dtype, self.workspace, self.in_fp8 = dtype, workspace, in_fp8
        self.done, self.reasons = [], Counter()

    def replace(self, base: torch.nn.Module) -> None:
        """Replace what fits in the model; `done` holds the replacements, `reasons` why others are missing."""
        for owner in list(base.modules()):
            if hasattr(owner, "rotary_emb"):
                for layer in getattr(owner, "layers", []):
                    self._try(self._layer, layer, owner.rotary_emb)
        for module in list(base.modules()):
            if has(module, *GATED, "down_proj"):
                self._try(self._mlp, module)
        for module in list(base.modules()):
            for names in (ATTENTION, GATED):
                if has(module, *names):
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
            item = make(*arguments)
        except Unfit as reason:
            self.reasons[str(reason)] += 1
            return
        self.done.append(item)
        if self.in_fp8:  # only now: what was compared above has 16-bit products' exactness
            for group in item.groups:
                if not group.use_fp8():
                    self.reasons[f"fp8 products need sizes that {fp8.SIZE_MULTIPLE} divides"] += 1

    def _parts(self, parent: torch.nn.Module, *names: str) -> list[Part]:
        parts = [part_of(parent, name, self.dtype) for name in names]
        if len({shape_of(part.base)[1] for part in parts}) != 1:
            raise Unfit("layers with inputs of different widths")
        return parts

    def _groups(self, *lists: list[Part]) -> list[Group]:
        return [Group(parts, self.dtype, self.workspace) for parts in lists]

    def _products(self, parent: torch.nn.Module, *names: str) -> SharedInput:
        return SharedInput(*self._groups(self._parts(parent, *names)))

    def _mlp(self, mlp: torch.nn.Module) -> FoldedMLP:
        if set(dict(mlp.named_children())) - {*GATED, "down_proj", "act_fn"} or "forward" in mlp.__dict__:
            raise Unfit(f"MLP {type(mlp).__name__}")
        activation_of(mlp)
        lists = [self._parts(mlp, *GATED), self._parts(mlp, "down_proj")]
        base = lists[0][0].base
        x = sample(1, PROBE_TOKENS, base.in_features).to(base.weight.device, self.dtype)
        with torch.no_grad():
            expected = mlp(x)
            folded = FoldedMLP(mlp, *self._groups(*lists))
            self._compare(folded, {"output": expected}, {"output": mlp(x)})
        return folded

    def _layer(self, layer: torch.nn.Module, rotary: torch.nn.Module) -> FoldedLayer:
        if not like_llama(layer):
            raise Unfit(f"layer {type(layer).__name__} is not of Llama's kind")
        attention, mlp = layer.self_attn, layer.mlp
        norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm), activation_of(mlp)
        lists = [self._parts(attention, *ATTENTION), self._parts(attention, "o_proj")]
        lists += [self._parts(mlp, *GATED), self._parts(mlp, "down_proj")]
        base = lists[0][0].base
        hidden = sample(1, PROBE_TOKENS, base.in_features).to(base.weight.device, self.dtype)
        expected = record(layer, rotary, hidden)
        options = {name: value for name, value in expected.items() if name not in RECORDED}
        folded = FoldedLayer(layer, self._groups(*lists), options)
        try:
            found = record(layer, rotary, hidden)
        except Unfit:
            folded.detach()
            raise
        self._compare(folded, expected, found)
        return folded

    def _compare(self, folded, expected: dict, found: dict) -> None:
        if not agree(expected, found, TOLERANCE[self.dtype]):
            folded.detach()
            raise Unfit(f"{type(folded.modules[0]).__name__} computes something else")
