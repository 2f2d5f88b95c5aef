"""Llama-like decoder layers as they are evaluated: fewer, larger matmuls and the kernels of training between them.

Queries, keys and values are one matmul, and so are gate and up; the residual is added by the matmul before it. Weights
are joined once and their parameters become views of the joined ones, so nothing is held twice. Which layers these are
is found out by trying, as for training (fused_lora.layer_probes).
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adder.kernels.fused_lora.layer_probes import (
    GATE_UP,
    PROBE_TOKENS,
    QKV,
    RECORDED,
    TOLERANCE,
    is_llama_like,
    probe_activation,
    probe_rmsnorm,
    record_layer,
    records_agree,
    sample_normal,
)
from adder.kernels.fused_lora.weights import AnyModule, CannotFuse
from adder.kernels.rope import apply_rope, rope_table
from adder.kernels.swiglu import swiglu_into


@contextmanager
def fused_for_inference(model: PreTrainedModel) -> Iterator[int]:
    """Let the decoder layers that are like Llama's compute as InferenceLayer inside; gives how many there are.

    The first of a kind is tried on some tokens; whether the whole model then computes the same is for the caller to
    see. Nothing can be trained inside. Parameters keep their values and names.
    """
    fused: list[InferenceLayer] = []
    reasons: Counter[str] = Counter()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for parent in model.modules():
            rotary = getattr(parent, "rotary_emb", None)
            for layer in getattr(parent, "layers", None) or [] if rotary is not None else []:
                try:
                    alike = next((other for other in fused if is_like(layer, other.layer)), None)
                    fused.append(fuse(layer, rotary) if alike is None else InferenceLayer(layer, alike.options, alike))
                except CannotFuse as reason:
                    reasons[f"{reason}{f' ({reason.__cause__})' if reason.__cause__ else ''}"] += 1
        if reasons:
            print(f"layers computed as they are written: {dict(reasons)}", file=sys.stderr)
        yield len(fused)
    finally:
        for layer in fused:
            layer.detach()
        for parameter in trained:
            parameter.requires_grad_()


def is_like(layer: AnyModule, other: AnyModule) -> bool:
    """Whether two layers are of the same modules with the same sizes and types of weights."""

    def parts(of: AnyModule) -> list[tuple[str, type]]:
        return [(name, type(module)) for name, module in of.named_modules()]

    def weights(of: AnyModule) -> list[tuple[str, torch.Size, torch.dtype, torch.device]]:
        return [(name, value.shape, value.dtype, value.device) for name, value in of.named_parameters()]

    return "forward" not in layer.__dict__ and parts(layer) == parts(other) and weights(layer) == weights(other)


def fuse(layer: AnyModule, rotary: AnyModule) -> "InferenceLayer":
    """Have a layer compute by InferenceLayer. Raises CannotFuse, the layer left alone, where it can't or differs."""
    if not is_llama_like(layer):
        raise CannotFuse(f"layer {type(layer).__name__} is not like Llama's")
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, name) for name in (*QKV, "o_proj")] + [mlp.down_proj]
    linears += [getattr(mlp, name) for name in GATE_UP]
    if any(type(linear) is not torch.nn.Linear for linear in linears):
        raise CannotFuse("quantised or adapted linear layers")
    weight = attention.q_proj.weight
    if any(linear.weight.dtype != weight.dtype or linear.weight.device != weight.device for linear in linears):
        raise CannotFuse("linear layers of several types or devices")
    if weight.dtype not in TOLERANCE:
        raise CannotFuse(f"weights in {weight.dtype}")
    hidden = sample_normal(1, PROBE_TOKENS, attention.q_proj.in_features).to(weight.device, weight.dtype)
    expected = record_layer(layer, rotary, hidden)
    fused = InferenceLayer(layer, {name: value for name, value in expected.items() if name not in RECORDED})
    try:
        found = record_layer(layer, rotary, hidden)
    except CannotFuse:
        fused.detach()
        raise
    if not records_agree(expected, found, TOLERANCE[weight.dtype]):
        fused.detach()
        gaps = differences(expected, found)
        raise CannotFuse(f"{type(layer).__name__} computes something else: {gaps}")
    return fused


def differences(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Relative differences of what two records have as tensors, for a message."""
    pairs = {name: (value, found.get(name)) for name, value in expected.items() if isinstance(value, torch.Tensor)}
    return {
        name: round(float((a.float() - b.float()).norm() / a.float().norm()), 5)
        for name, (a, b) in pairs.items()
        if isinstance(b, torch.Tensor) and a.shape == b.shape
    }


class InferenceLayer:
    """Forward of a Llama-like decoder layer without gradients: norm, attention, addition; norm, SwiGLU MLP, addition.

    `options`: what the layer tells its attention function beside queries, keys, values, mask and dropout. `alike`: one
    of the same kind, whose norms and activation were found out.
    """

    def __init__(self, layer: AnyModule, options: dict[str, Any], alike: "InferenceLayer | None" = None):
        self.layer, self.options = layer, options
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if alike is None:
            self.norms = tuple(probe_rmsnorm(norm) for norm in norms)
            self.activation = probe_activation(mlp)
        else:
            self.norms = tuple(replace(known, module=norm) for known, norm in zip(alike.norms, norms, strict=True))
            self.activation = alike.activation
        self.head_size = attention.head_dim
        home: Any = sys.modules[type(attention).__module__]
        self.eager, self.rotary = home.eager_attention_forward, home.apply_rotary_pos_emb
        # Where a norm stands between projection and RoPE, both are left to the model's own functions.
        self.head_norms = hasattr(attention, "q_norm")
        self.qkv = join_linears([getattr(attention, name) for name in QKV])
        self.gate_up = join_linears([getattr(mlp, name) for name in GATE_UP])
        layer.forward = self.forward

    def detach(self) -> None:
        """Give the layer its own forward again."""
        del self.layer.forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the layer's own."""
        assert position_embeddings is not None, "Llama-like models hand RoPE's cosines and sines to their layers"
        attention, mlp = self.layer.self_attn, self.layer.mlp
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.norms[0].into(x.contiguous(), normed)
        heads = torch.nn.functional.linear(normed, *self.qkv).view(*shape[:-1], -1, self.head_size)
        rotated = (attention.q_proj.out_features + attention.k_proj.out_features) // self.head_size
        cos, sin = position_embeddings
        if not self.head_norms:
            flat = heads.view(-1, *heads.shape[-2:])
            apply_rope(flat[:, :rotated], rope_table(cos), rope_table(sin))
        counts = [getattr(attention, name).out_features // self.head_size for name in QKV]
        query, key, value = heads.split(counts, dim=-2)
        if self.head_norms:
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if self.head_norms:
            query, key = self.rotary(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, self.eager)
        mixed, _ = function(attention, query, key, value, attention_mask, dropout=0.0, **self.options | kwargs)
        x = _add_linear(x, mixed.reshape(len(x), -1), attention.o_proj)
        self.norms[1].into(x, normed)
        gate_up = torch.nn.functional.linear(normed, *self.gate_up)
        product = gate_up.new_empty(len(x), gate_up.shape[1] // 2)
        swiglu_into(gate_up, self.activation, product)
        return _add_linear(x, product, mlp.down_proj, in_place=True).view(shape)


def join_linears(linears: list[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of several linear layers with the same input as of one; theirs become views of these."""
    weight = _joined([linear.weight for linear in linears])
    named = [dict(linear.named_parameters()) for linear in linears]
    biases = [parameters["bias"] for parameters in named if "bias" in parameters]
    if not biases:
        return weight, None
    if len(biases) < len(linears):
        raise CannotFuse("a bias that only some of the projections have")
    return weight, _joined(biases)


def _joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():  # else nothing could train the parameters any more
        joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return joined


def _add_linear(
    residual: torch.Tensor, x: torch.Tensor, linear: torch.nn.Linear, in_place: bool = False
) -> torch.Tensor:
    """The residual plus the linear layer's output, rounded once; `in_place`: in the residual's own memory."""
    weight = linear.weight.t()
    total = residual.addmm_(x, weight) if in_place else torch.addmm(residual, x, weight)
    return total if linear.bias is None else total.add_(linear.bias)
