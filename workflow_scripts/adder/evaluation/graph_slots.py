"""KV cache slots on a GPU, where a step of one token a reply is replayed as a CUDA graph.

A step of a large model is a thousand small kernels, which Python launches more slowly than the GPU runs them. Here the
step is captured once, for all slots: attention reads of each slot only what it holds (kernels.decode_attention), the
likeliest token is found on the GPU and is the next step's input, and the host looks at the tokens of several steps at
once. Llama-like layers compute with the kernels that training has as well (kernels.inference_layers); others as
transformers writes them.

Whether a model can be run so is found out on its own prompts: the logits of a few steps are compared with those of the
model's usual forward pass. Where they differ, or where something can't be captured, the usual slots are taken.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from adder.evaluation.kv_cache_slots import KVCacheSlots, keys_and_values
from adder.kernels import families
from adder.kernels.decode_attention import attend_to_cache, store_token
from adder.kernels.inference_layers import fused_for_inference
from adder.kernels.row_argmax import row_argmax

NAME = "adder_decode"
STEPS = 4  # between two looks at the tokens: one costs a few per cent of a step, and replies end in between
PROBES, PROBE_TOKENS, PROBE_STEPS = 4, 48, 3  # prompts, tokens of each, and steps that logits are compared at
# Relative difference of logits that rounding explains after all layers, by dtype; or NOISE times the one between two
# ways in which the model usually computes them, if that is more, up to LARGEST.
# (Random weights of 8B in bf16: 0.06 to 0.07.)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
NOISE, LARGEST = 2.0, 0.2
# cuDNN's attention makes a plan for each new shape, and prompts come in many.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Slots(Protocol):
    """What speculative_decoding writes replies in; kv_cache_slots.KVCacheSlots says what each is."""

    count: int
    rows: list[int]

    def add(self, rows: Sequence[int], lengths: Sequence[int], picked: Sequence[int], source: DynamicCache) -> None:
        """Give slots to requests, with the keys and values of the rows `picked` of `source`."""

    def steps(self, tokens: Sequence[int], most: int) -> list[list[int]]:
        """Go on from each reply's last token by `most` steps or fewer; return the tokens of each step."""
        ...

    def keep(self, going_on: Sequence[bool]) -> None:
        """Free the slots of the others."""


@contextmanager
def fastest_slots(model: PreTrainedModel, texts: Sequence[Sequence[int]], count: int, capacity: int) -> Iterator[Slots]:
    """The slots that suit the model and its device. Inside, the model may compute by other kernels than usually.

    texts: token ids to try it on.
    """
    if model.device.type != "cuda":
        yield KVCacheSlots(model, count, capacity)
        return
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(BACKENDS))
        slots = graph_slots(model, texts, count, capacity, stack)
        yield slots if slots is not None else KVCacheSlots(model, count, capacity)


def graph_slots(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], count: int, capacity: int, stack: ExitStack
) -> "GraphSlots | None":
    """The slots, if the model computes by them what it should; `stack` then holds what is to be undone."""
    probes = [list(text[:PROBE_TOKENS]) for text in texts[:count] if len(text) > PROBE_STEPS][:PROBES]
    if not probes or model.dtype not in TOLERANCE or families.why_off("decode_attention"):
        return None
    expected = usual_logits(model, probes)
    gap = relative(usual_logits(model, probes[:1]), expected[:1]).max()  # by other shapes, in another order of sums
    allowed = max(TOLERANCE[model.dtype], min(NOISE * float(gap), LARGEST))
    for fused in (True, False):
        with ExitStack() as attempt:
            try:
                if fused and not attempt.enter_context(fused_for_inference(model)):
                    continue
                slots = GraphSlots(model, count, capacity)
                if agree(model, slots, probes, expected, allowed):
                    stack.push(attempt.pop_all())
                    return slots
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model of another kind makes of a mask, a cache or a capture
                print(f"decoding by a CUDA graph failed: {type(error).__name__}: {error}", file=sys.stderr)
            slots = None
    return None


@torch.inference_mode()
def usual_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after each of the last PROBE_STEPS tokens of each text, in one batch: fp32 (texts, steps, vocabulary)."""
    head: Any = model.get_output_embeddings()
    hidden = model.base_model(input_ids=padded(texts).to(model.device), use_cache=False).last_hidden_state
    rows = [hidden[row, len(text) - PROBE_STEPS : len(text)] for row, text in enumerate(texts)]
    return head(torch.stack(rows)).float()


def padded(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The texts as rows of a matrix; padding comes last, where nothing that counts attends to it."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text))
    return ids


def relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Norm of the difference of each row, relative to the expected row's."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@torch.inference_mode()
def agree(
    model: PreTrainedModel,
    slots: "GraphSlots",
    texts: Sequence[Sequence[int]],
    expected: torch.Tensor,
    allowed: float,
) -> bool:
    """Whether steps in `slots` give the expected logits; the slots are empty afterwards."""
    starts = [text[:-PROBE_STEPS] for text in texts]
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=padded(starts).to(model.device), past_key_values=cache, use_cache=True)
    numbers = list(range(len(texts)))
    slots.add(numbers, [len(start) for start in starts], numbers, cache)
    for step in range(PROBE_STEPS):
        slots.steps([text[step - PROBE_STEPS] for text in texts], 1)
        distance = relative(slots.logits[: len(texts)].float(), expected[:, step])
        if not bool((distance <= allowed).all()):
            gaps = [round(gap, 4) for gap in distance.tolist()]
            print(f"decoding by a CUDA graph gives other logits: {gaps} apart, allowed {allowed:.4f}", file=sys.stderr)
            return False
    slots.keep([False] * len(texts))
    return True


class GraphSlots(Cache):
    """Keys and values of `count` replies in the making, as KVCacheSlots has them, with steps that are a CUDA graph.

    `rows[n]` is the request of the n-th reply, which is in slot `places[n]` and has `lengths[n]` tokens. On other
    devices the steps are computed as they come, for tests.
    """

    def __init__(self, model: PreTrainedModel, count: int, capacity: int) -> None:
        self.model, self.count, self.capacity = model, count, capacity + STEPS
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.places: list[int] = []
        self.free = list(range(count))
        device = model.device
        # What the steps read and write. Slots that aren't used compute something at their first position.
        self.tokens = torch.zeros(count, dtype=torch.long, device=device)
        self.positions = torch.zeros(count, dtype=torch.long, device=device)
        self.written = torch.zeros(STEPS, count, dtype=torch.long, device=device)
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        self.logits = torch.zeros(0)
        self.graph: Any = None
        self.slot_layers = [GraphSlotLayer(self.positions) for _ in DynamicCache(config=model.config).layers]
        super().__init__(layers=list(self.slot_layers))

    def add(self, rows: Sequence[int], lengths: Sequence[int], picked: Sequence[int], source: DynamicCache) -> None:
        """Give slots to requests, with the keys and values of the rows `picked` of `source`."""
        if not rows:
            return
        places, self.free = self.free[: len(rows)], self.free[len(rows) :]
        device = self.model.device
        into, origin = torch.tensor(places, device=device), torch.tensor(list(picked), device=device)
        for layer, read in zip(self.slot_layers, source.layers, strict=True):
            layer.store(into, origin, *keys_and_values(read), self.count, self.capacity)
        self.rows += rows
        self.lengths += lengths
        self.places += places

    def steps(self, tokens: Sequence[int], most: int) -> list[list[int]]:
        """Go on from each reply's last token by some steps, `most` or fewer; return the tokens of each step."""
        state = torch.zeros(2, self.count, dtype=torch.long)
        places = torch.tensor(self.places)
        state[0, places], state[1, places] = torch.tensor(list(tokens)), torch.tensor(self.lengths)
        self._set(state)
        if self.graph is None and self.model.device.type == "cuda":
            self._capture()
            self._set(state)
        count = min(STEPS, most)
        for _ in range(count):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step()
        self.lengths = [length + count for length in self.lengths]
        return self.written[:count].cpu()[:, places].tolist()

    def keep(self, going_on: Sequence[bool]) -> None:
        """Free the slots of the others."""
        kept = [number for number, on in enumerate(going_on) if on]
        self.free += [place for place, on in zip(self.places, going_on, strict=True) if not on]
        self.rows = [self.rows[number] for number in kept]
        self.lengths = [self.lengths[number] for number in kept]
        self.places = [self.places[number] for number in kept]

    def _set(self, state: torch.Tensor) -> None:
        state = state.to(self.model.device)
        self.tokens.copy_(state[0])
        self.positions.copy_(state[1])
        self.number.zero_()

    def _step(self) -> None:
        """Read one more token in each slot; note the likeliest next one, which is what the next step reads."""
        lengths = (self.positions + 1).int().view(-1, 1, 1, 1)
        with attention(self.model, NAME):
            hidden = self.model.base_model(
                input_ids=self.tokens[:, None],
                position_ids=self.positions[:, None],
                attention_mask=lengths,
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        self.logits = head(hidden[:, -1])
        likeliest = row_argmax(self.logits)
        self.written.index_copy_(0, self.number, likeliest[None])
        self.tokens.copy_(likeliest)
        self.positions.add_(1)
        self.number.add_(1).remainder_(STEPS)

    def _capture(self) -> None:
        """Capture a step. What was computed for it before counts for nothing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled, workspaces taken
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph


class GraphSlotLayer(DynamicLayer):
    """One layer's keys and values, shape (slots, heads, capacity, size); each slot writes at its own of `positions`."""

    def __init__(self, positions: torch.Tensor) -> None:
        super().__init__()
        self.positions = positions

    def store(
        self,
        slots: torch.Tensor,
        picked: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        count: int,
        capacity: int,
    ) -> None:
        """Fill slots; what doesn't fit is padding or beyond the longest reply."""
        if not self.is_initialized:
            self.keys, self.values = (t.new_zeros(count, t.shape[1], capacity, t.shape[3]) for t in (keys, values))
            self.is_initialized = True
        own_keys, own_values = keys_and_values(self)
        width = min(keys.shape[2], capacity)
        own_keys[slots, :, :width] = keys[picked, :, :width]
        own_values[slots, :, :width] = values[picked, :, :width]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's keys and values into each slot; return the whole cache, for attend_to_cache."""
        keys, values = keys_and_values(self)
        store_token(key_states[:, :, 0], value_states[:, :, 0], self.positions, keys, values)
        return keys, values


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Attention by the function of this name inside, then as before."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


AttentionInterface.register(NAME, attend_to_cache)
