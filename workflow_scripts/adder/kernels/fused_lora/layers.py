"""Modules whose forward fused LoRA replaces: linear layers that share an input, SwiGLU MLPs, Llama-like decoder layers.

Each object stands in for the forward of the modules it names, hands back to their own whenever something is not as it
was when it was made (another adapter, a merge, other dtypes), and gives them their own again on `detach`.
"""

import sys
from functools import partial
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adder.kernels.fused_lora.autograd_functions import LoraLinear, LoraQKV, LoraSwiGLU
from adder.kernels.fused_lora.layer_probes import probe_activation, probe_rmsnorm
from adder.kernels.fused_lora.weights import AnyModule, LinearGroup
from adder.kernels.rope import rope_table


class FusedLinears:
    """Forward of linear layers that are called one after the other with the same input: the first computes for all."""

    def __init__(self, group: LinearGroup):
        self.group = group
        # By index, what the first of these layers computed for the others, and from which input.
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.modules = [part.module for part in group.parts]
        for index, module in enumerate(self.modules):
            module.forward = partial(self.forward, index)

    def forward(self, index: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer's own, for the layer of this index."""
        module = self.modules[index]
        if args or kwargs or x.dtype != self.group.dtype or not self.group.is_intact():
            return type(module).forward(module, x, *args, **kwargs)
        source, output = self.waiting.pop(index, (None, None))
        if source is x and output is not None:
            return output
        rows = x.reshape(-1, x.shape[-1])
        y = LoraLinear.apply(rows, None, self.group, *self.group.parameters).view(*x.shape[:-1], -1)
        outputs = [y[..., part.rows] for part in self.group.parts]
        self.waiting = {i: (x, output) for i, output in enumerate(outputs) if i != index}
        return outputs[index]

    def detach(self) -> None:
        """Give the layers their own forward again."""
        for module in self.modules:
            del module.forward
        self.group.release()

    @property
    def groups(self) -> list[LinearGroup]:
        """The group, as the other replacements have them."""
        return [self.group]


class FusedMLP:
    """Forward of a SwiGLU MLP: gate, up and down projections."""

    def __init__(self, mlp: AnyModule, gate_up: LinearGroup, down: LinearGroup):
        self.modules, self.groups = [mlp], [gate_up, down]
        self.activation = probe_activation(mlp)
        mlp.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the MLP's own."""
        mlp, (gate_up, down) = self.modules[0], self.groups
        if x.dtype != gate_up.dtype or not (gate_up.is_intact() and down.is_intact()):
            return type(mlp).forward(mlp, x)
        y = LoraSwiGLU.apply(
            x.reshape(-1, x.shape[-1]), None, self.activation, gate_up, down, *gate_up.parameters, *down.parameters
        )
        return y.view(x.shape)

    def detach(self) -> None:
        """Give the MLP its own forward again."""
        del self.modules[0].forward
        for group in self.groups:
            group.release()


class FusedDecoderLayer:
    """Forward of a Llama-like decoder layer: norm, attention, addition; norm, SwiGLU MLP, addition.

    `options`: what the layer tells its attention function beside queries, keys, values, mask and dropout.
    """

    def __init__(self, layer: AnyModule, groups: list[LinearGroup], options: dict[str, Any]):
        self.layer, self.modules, self.groups = layer, [layer], groups
        attention = layer.self_attn
        self.norms = (probe_rmsnorm(layer.input_layernorm), probe_rmsnorm(layer.post_attention_layernorm))
        self.activation = probe_activation(layer.mlp)
        self.head_size = attention.head_dim
        home: Any = sys.modules[type(attention).__module__]
        self.eager = home.eager_attention_forward
        self.rotary = home.apply_rotary_pos_emb
        # Where a norm stands between projection and RoPE, both are left to the model's own functions.
        self.head_norms = hasattr(attention, "q_norm") or hasattr(attention, "k_norm")
        self.options = options
        layer.forward = self.forward

    def detach(self) -> None:
        """Give the layer its own forward again."""
        del self.layer.forward
        for group in self.groups:
            group.release()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer's own, with gradient checkpointing where that is on."""
        layer = self.layer
        fits = hidden_states.dtype == self.groups[0].dtype and all(group.is_intact() for group in self.groups)
        if args or not fits:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            kwargs |= {"use_cache": False, "past_key_values": None}
            return layer._gradient_checkpointing_func(partial(self._run, **kwargs), hidden_states)
        return self._run(hidden_states, **kwargs)

    def _run(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        assert position_embeddings is not None, "Llama-like models hand RoPE's cosines and sines to their layers"
        attention = self.layer.self_attn
        qkv, out, gate_up, down = self.groups
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        cos, sin = position_embeddings
        tables = (None, None) if self.head_norms else (rope_table(cos), rope_table(sin))
        *heads, residual = LoraQKV.apply(x, self.norms[0], *tables, self.head_size, qkv, *qkv.parameters)
        query, key, value = (y.view(*shape[:-1], -1, self.head_size) for y in heads)
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
        x = LoraLinear.apply(mixed.reshape(-1, out.inputs), residual, out, *out.parameters)
        parameters = (*gate_up.parameters, *down.parameters)
        return LoraSwiGLU.apply(x, self.norms[1], self.activation, gate_up, down, *parameters).view(shape)
