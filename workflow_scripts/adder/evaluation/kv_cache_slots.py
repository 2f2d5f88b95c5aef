"""A cache with a slot for each reply in the making, each at its own length, for steps of one token."""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class Slots(Cache):
    """Keys and values of `count` replies in the making, at most `capacity` tokens each.

    `rows[slot]` is the request whose reply is there and `lengths[slot]` how many of its tokens; used slots come first.
    """

    def __init__(self, model: PreTrainedModel, count: int, capacity: int):
        self.model, self.count, self.capacity = model, count, capacity
        self.rows: list[int] = []
        self.lengths: list[int] = []
        super().__init__(layers=[SlotLayer() for _ in DynamicCache(config=model.config).layers])

    def add(self, rows: list[int], lengths: list[int], picked: list[int], source: DynamicCache) -> None:
        """Give slots to requests, with the keys and values of the rows `picked` of `source`."""
        start, end = len(self.rows), len(self.rows) + len(rows)
        for layer, read in zip(self.layers, source.layers, strict=True):
            layer.store(start, end, read.keys[picked], read.values[picked], self.count, self.capacity)
        self.rows += rows
        self.lengths += lengths

    def step(self, tokens: list[int]) -> list[int]:
        """Read one more token of each reply; return the likeliest next ones."""
        device = self.model.device
        places = torch.tensor(self.lengths, device=device)
        width = max(self.lengths) + 1
        # Added to the scores: nothing up to a reply's own place, -inf beyond.
        mask = torch.zeros(len(tokens), 1, 1, width, dtype=self.model.dtype, device=device)
        mask.masked_fill_(torch.arange(width, device=device) > places[:, None, None, None], float("-inf"))
        used = torch.arange(len(tokens), device=device)
        for layer in self.layers:
            layer.used, layer.places, layer.width = used, places, width
        hidden = self.model.base_model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=places[:, None],
            attention_mask=mask,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        self.lengths = [length + 1 for length in self.lengths]
        return self.model.get_output_embeddings()(hidden[:, -1]).argmax(-1).tolist()

    def keep(self, going_on: list[bool]) -> None:
        """Free the slots of the others; the last of the used slots move into the gaps."""
        count = sum(going_on)
        gaps = [slot for slot in range(count) if not going_on[slot]]
        movers = [slot for slot in range(count, len(going_on)) if going_on[slot]]
        order = list(range(len(going_on)))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        if movers:
            for layer in self.layers:
                layer.move(movers, gaps, max(self.lengths))
        self.rows = [self.rows[slot] for slot in order[:count]]
        self.lengths = [self.lengths[slot] for slot in order[:count]]


class SlotLayer(DynamicLayer):
    """One layer's keys and values, shape (slots, heads, capacity, size).

    Set before a step: `used`, the slots in use, from 0 on; `places`, where each writes; `width`, how far one reads.
    """

    def store(self, start: int, end: int, keys: torch.Tensor, values: torch.Tensor, count: int, capacity: int) -> None:
        """Fill slots `start` to `end`; what doesn't fit is padding or beyond the longest reply."""
        if not self.is_initialized:
            self.keys, self.values = (t.new_zeros(count, t.shape[1], capacity, t.shape[3]) for t in (keys, values))
            self.is_initialized = True
        width = min(keys.shape[2], capacity)
        self.keys[start:end, :, :width] = keys[:, :, :width]
        self.values[start:end, :, :width] = values[:, :, :width]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write one token's keys and values into each used slot; return those of all used slots."""
        self.keys[self.used, :, self.places] = key_states[:, :, 0]
        self.values[self.used, :, self.places] = value_states[:, :, 0]
        return self.keys[: len(self.used), :, : self.width], self.values[: len(self.used), :, : self.width]

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy slots onto others."""
        self.keys[targets, :, :width] = self.keys[sources, :, :width]
        self.values[targets, :, :width] = self.values[sources, :, :width]
