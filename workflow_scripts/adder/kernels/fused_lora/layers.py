"""Modules whose forward folded LoRA replaces: layers that share an input, gated MLPs, decoder layers of Llama's kind.

Each object stands in for the forward of the modules it names, hands back to their own whenever something is not as it
was when it was made (another adapter, a merge, other dtypes), and gives them their own again on `detach`.
"""

import sys
from functools import partial

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adder.kernels.fused_lora.autograd_functions import AttentionInput, GatedMLP, Linear
from adder.kernels.fused_lora.layer_probes import activation_of, norm_of
from adder.kernels.fused_lora.weights import Group


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
        """The group, as the other replacements have them."""
        return [self.group]


class FoldedMLP:
    """Forward of an MLP with gate, up and down."""

    def __init__(self, mlp: torch.nn.Module, first: Group, second: Group):
        self.modules, self.groups = [mlp], [first, second]
        self.activation = activation_of(mlp)
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
        self.norms = (norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm))
        self.activation = activation_of(layer.mlp)
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
