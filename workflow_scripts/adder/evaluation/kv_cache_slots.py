"""A KV cache with a slot for each reply in the making, each at its own length, for steps of one token."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class KVCacheSlots(Cache):
    """Keys and values of `count` replies in the making, at most `capacity` tokens each.

    `rows[slot]` is the request whose reply is there and `lengths[slot]` how many of its tokens; used slots come first.
    """

    def __init__(self, model: PreTrainedModel, count: int, capacity: int) -> None:
        self.model, self.count, self.capacity = model, count, capacity
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.slot_layers = [KVCacheSlotLayer() for _ in DynamicCache(config=model.config).layers]
        super().__init__(layers=list(self.slot_layers))

    def add(self, rows: Sequence[int], lengths: Sequence[int], picked: Sequence[int], source: DynamicCache) -> None:
        """Give slots to requests, with the keys and values of the rows `picked` of `source`."""
        start, end = len(self.rows), len(self.rows) + len(rows)
        for layer, read in zip(self.slot_layers, source.layers, strict=True):
            keys, values = keys_and_values(read)
            layer.store(start, end, keys[list(picked)], values[list(picked)], self.count, self.capacity)
        self.rows += rows
        self.lengths += lengths

    def steps(self, tokens: Sequence[int], most: int) -> list[list[int]]:
        """Go on from each reply's last token; return the next tokens of all of them, one list a step, here one."""
        return [self.step(tokens)]

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Read one more token of each reply; return the argmax of each one's logits."""
        device = self.model.device
        positions = torch.tensor(self.lengths, device=device)
        width = max(self.lengths) + 1
        # Added to the scores: nothing up to a reply's own position, -inf beyond.
        mask = torch.zeros(len(tokens), 1, 1, width, dtype=self.model.dtype, device=device)
        mask.masked_fill_(torch.arange(width, device=device) > positions[:, None, None, None], float("-inf"))
        used = torch.arange(len(tokens), device=device)
        for layer in self.slot_layers:
            layer.used, layer.positions, layer.width = used, positions, width
        hidden = self.model.base_model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        self.lengths = [length + 1 for length in self.lengths]
        head: Any = self.model.get_output_embeddings()
        return head(hidden[:, -1]).argmax(-1).tolist()

    def keep(self, going_on: Sequence[bool]) -> None:
        """Free the slots of the others; the last of the used slots move into the gaps."""
        count = sum(going_on)
        gaps = [slot for slot in range(count) if not going_on[slot]]
        movers = [slot for slot in range(count, len(going_on)) if going_on[slot]]
        order = list(range(len(going_on)))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        if movers:
            for layer in self.slot_layers:
                layer.move(movers, gaps, max(self.lengths))
        self.rows = [self.rows[slot] for slot in order[:count]]
        self.lengths = [self.lengths[slot] for slot in order[:count]]


class KVCacheSlotLayer(DynamicLayer):
    """One layer's keys and values, shape (slots, heads, capacity, size).

    Set before a step: `used`, the slots in use, from 0 on; `positions`, where each writes; `width`, how far one reads.
    """

    used: torch.Tensor
    positions: torch.Tensor
    width: int

    def store(self, start: int, end: int, keys: torch.Tensor, values: torch.Tensor, count: int, capacity: int) -> None:
        """Fill slots `start` to `end`; what doesn't fit is padding or beyond the longest reply."""
        if not self.is_initialized:
            self.keys, self.values = (t.new_zeros(count, t.shape[1], capacity, t.shape[3]) for t in (keys, values))
            self.is_initialized = True
        own_keys, own_values = keys_and_values(self)
        width = min(keys.shape[2], capacity)
        own_keys[start:end, :, :width] = keys[:, :, :width]
        own_values[start:end, :, :width] = values[:, :, :width]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's keys and values into each used slot; return those of all used slots."""
        keys, values = keys_and_values(self)
        keys[self.used, :, self.positions] = key_states[:, :, 0]
        values[self.used, :, self.positions] = value_states[:, :, 0]
        return keys[: len(self.used), :, : self.width], values[: len(self.used), :, : self.width]

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Copy slots onto others."""
        for states in keys_and_values(self):
            states[list(targets), :, :width] = states[list(sources), :, :width]


def keys_and_values(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a layer of a cache that has read something."""
    return layer.keys, layer.values
