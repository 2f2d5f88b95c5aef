"""Greedy replies to many prompts at once, without the work that a generation loop usually does in vain.

1. A request may bring draft tokens: a guess at its reply. They are read in the pass over the prompt, and the reply is
   the draft as far as the model would have written it itself, token for token, then what the model writes instead:
   greedy speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with a draft that is given. A held-out row's
   reference is such a draft, so the pass that measures the loss on it is the beginning of the generation as well, and a
   reply that equals its reference takes no further pass.
2. Each reply has a slot in a KV cache of fixed size. A reply that ends leaves its slot, and a waiting prompt takes it:
   nothing is computed for replies that have ended, and none waits for the longest of a batch.
3. What all prompts begin with, a system prompt say, is computed once.
4. On a GPU the step of one token a reply is a CUDA graph (graph_slots).
5. A reply that has been repeating itself for long is taken to go on so (text_loops).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from adder.core.labels import IGNORE_INDEX
from adder.evaluation.graph_slots import fastest_slots
from adder.evaluation.kv_cache_slots import keys_and_values
from adder.evaluation.text_loops import continue_loop, has_loop, loop_period
from adder.kernels.labelled_loss import has_plain_head

PREFILL_TOKENS = 4096  # positions of one pass over prompts, padding included; matmuls over more are no faster on a GPU
HEAD_POSITIONS = 1024  # positions whose logits are computed at once
PLAIN_ROPE = ("default", "linear", "llama3", "yarn", "proportional")  # that depend on a token's position alone
REFILL_SHARE = 0.25  # of the slots must be free before prompts are read: one pass for several


@dataclass
class Request:
    """One prompt to reply to: `ids` are the prompt's `prompt_length` tokens, then draft tokens, if there are any.

    `labels`, where a loss is wanted too, as for training: IGNORE_INDEX, or the token itself, at each position of `ids`.
    """

    ids: Sequence[int]
    prompt_length: int
    labels: Sequence[int] | None = None


@dataclass
class Reply:
    """New token ids, the ending one included; whether there is one; losses (nats, fp32) at the request's labels.

    `looped`: of a reply that was repeating itself, how many tokens were computed; the rest goes on as they do.
    """

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    losses: torch.Tensor | None = None
    looped: int | None = None

    @property
    def computed(self) -> int:
        """How many of the tokens the model wrote."""
        return len(self.ids) if self.looped is None else self.looped

    def is_done(self, limit: int) -> bool:
        """Whether no further token comes: it has ended, or has `limit` tokens."""
        return self.ended or len(self.ids) >= limit


def supports(model: PreTrainedModel) -> bool:
    """Whether `generate` can run the model: rotary positions, a plain LM head, and full attention in every layer.

    A sliding window, a recurrent state or ALiBi need more of a cache than keys and values by position; "dynamic" and
    "longrope" positions depend on the longest row of a batch.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    plain = rope.get("rope_type") in PLAIN_ROPE and not getattr(config, "alibi", False)
    layers = DynamicCache(config=model.config).layers
    return plain and has_plain_head(model) and all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    requests: list[Request],
    stop_ids: Sequence[int],
    limit: int,
    slots: int,
    observe: Callable[[list[Reply]], None],
    stops_at: Callable[[list[int], int], bool] = lambda ids, new: False,
) -> list[Reply]:
    """Reply to each request by the argmax of the logits each time, up to one of `stop_ids` or `limit` tokens.

    At most `slots` replies are written at a time. `observe` is called with all replies before each pass and at the end.
    `stops_at(ids, new)`: whether a reply ends for another reason within its last `new` tokens; where, the caller knows.
    """
    found = [Reply() for _ in requests]
    stops = set(stop_ids)
    capacity = max(request.prompt_length for request in requests) + limit
    # A reply that ought to repeat itself isn't cut short for it.
    may_loop = [has_loop(request.ids[request.prompt_length :]) for request in requests]
    with fastest_slots(model, [request.ids for request in requests], min(slots, len(requests)), capacity) as cache:
        prefix = read_prefix(model, requests[0].ids[: common_prefix_length(requests)])
        # Longest first: neighbours need little padding.
        waiting = sorted(range(len(requests)), key=lambda index: (-len(requests[index].ids), index))
        filling = True
        while waiting or cache.rows:
            observe(found)
            free = cache.count - len(cache.rows)
            filling = bool(waiting and free and (filling or free >= REFILL_SHARE * cache.count))
            if filling:
                most = prompts_at_once(len(requests[waiting[0]].ids), prefix.get_seq_length())
                batch, waiting = waiting[: min(free, most)], waiting[min(free, most) :]
                read = _read(model, prefix, requests, batch, found, stops, limit)
                for row in batch:
                    found[row].ended = found[row].ended or stops_at(found[row].ids, len(found[row].ids))
                going_on = [number for number, row in enumerate(batch) if not found[row].is_done(limit)]
                rows = [batch[number] for number in going_on]
                cache.add(rows, [requests[row].prompt_length + len(found[row].ids) - 1 for row in rows], going_on, read)
                continue
            left = max(limit - len(found[row].ids) for row in cache.rows)
            steps = cache.steps([found[row].ids[-1] for row in cache.rows], left)
            for slot, row in enumerate(cache.rows):
                _append(found[row], [tokens[slot] for tokens in steps], stops, limit, stops_at, may_loop[row])
            cache.keep([not found[row].is_done(limit) for row in cache.rows])
        observe(found)
    return found


def _append(
    reply: Reply,
    tokens: list[int],
    stops: set[int],
    limit: int,
    stops_at: Callable[[list[int], int], bool],
    may_loop: bool,
) -> None:
    """Lengthen a reply by what was computed after it, up to what ends it."""
    before = len(reply.ids)
    for token in tokens[: limit - before]:
        reply.ids.append(token)
        if token in stops:
            reply.ended = True
            break
    reply.ended = reply.ended or stops_at(reply.ids, len(reply.ids) - before)
    if reply.ended or may_loop:
        return
    period = loop_period(reply.ids, len(reply.ids) - before)
    if period is not None and len(reply.ids) < limit:
        reply.looped = len(reply.ids)
        reply.ids = continue_loop(reply.ids, period, limit)


def common_prefix_length(requests: list[Request]) -> int:
    """How many tokens all requests begin with, short of what predicts a label or the first token of a reply."""
    length = min(request.prompt_length for request in requests) - 1
    for request in requests:
        length = next((i for i in range(length) if request.ids[i] != requests[0].ids[i]), length)
        if request.labels is not None:
            length = next((i - 1 for i in range(1, length + 1) if request.labels[i] != IGNORE_INDEX), length)
    return length


def prompts_at_once(length: int, prefix: int) -> int:
    """How many prompts of `length` tokens are read in one pass. The beginning that they share takes only memory."""
    return max(1, PREFILL_TOKENS // max(length - prefix, length // 8))


def read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache:
    """Keys and values of what all requests begin with."""
    cache = DynamicCache(config=model.config)
    if ids:
        model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache)
    return cache


def _read(
    model: PreTrainedModel,
    prefix: DynamicCache,
    requests: list[Request],
    batch: list[int],
    found: list[Reply],
    stops: set[int],
    limit: int,
) -> DynamicCache:
    """One pass over prompts and drafts: fills in losses and what is accepted of each draft; returns the KV cache."""
    own = [requests[row] for row in batch]
    hidden, cache = _run(model, prefix, [request.ids for request in own])
    start = prefix.get_seq_length()
    positions = [predicting_positions(request, limit) for request in own]
    picked = torch.cat([hidden[number, [position - start for position in at]] for number, at in enumerate(positions)])
    pairs = [(request.ids, position + 1) for request, at in zip(own, positions, strict=True) for position in at]
    targets = torch.tensor([ids[next_] if next_ < len(ids) else 0 for ids, next_ in pairs], device=model.device)
    sizes = [len(at) for at in positions]
    best, losses = (values.split(sizes) for values in _argmax_and_losses(model, picked, targets))
    for number, (row, request, at) in enumerate(zip(batch, own, positions, strict=True)):
        greedy = dict(zip(at, best[number].tolist(), strict=True))
        labelled = [index for index, position in enumerate(at) if _is_label(request, position + 1)]
        found[row] = Reply(*accept_draft(request, greedy, stops, limit), losses[number][labelled])
    return cache


def _run(model: PreTrainedModel, prefix: DynamicCache, rows: list[Sequence[int]]) -> tuple[torch.Tensor, DynamicCache]:
    """Hidden states, shape (rows, tokens after the prefix, size), and the cache of one pass over whole rows."""
    start = prefix.get_seq_length()
    # Padding comes last, where nothing that counts attends to it.
    ids = torch.zeros(len(rows), max(map(len, rows)) - start, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row) - start] = torch.tensor(row[start:])
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(prefix.layers if start else []):
        keys, values = keys_and_values(layer)
        cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), number)
    output = model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    return output.last_hidden_state, cache


def predicting_positions(request: Request, limit: int) -> list[int]:
    """Positions of a request whose next token matters: it carries a label, or may be one of the reply."""
    positions = set(range(request.prompt_length - 1, min(len(request.ids), request.prompt_length + limit - 1)))
    return sorted(positions | {index - 1 for index in range(1, len(request.ids)) if _is_label(request, index)})


def _is_label(request: Request, position: int) -> bool:
    labels = request.labels
    return labels is not None and position < len(request.ids) and labels[position] != IGNORE_INDEX


def accept_draft(request: Request, greedy: dict[int, int], stops: set[int], limit: int) -> tuple[list[int], bool]:
    """What the model writes as far as the pass over the draft tells, and whether that ends the reply.

    `greedy`: the argmax after each position. It counts as long as all before it is what was drafted.
    """
    ids: list[int] = []
    for position in range(request.prompt_length - 1, request.prompt_length + limit - 1):
        ids.append(greedy[position])
        if ids[-1] in stops:
            return ids, True
        if position + 1 >= len(request.ids) or ids[-1] != request.ids[position + 1]:
            break
    return ids, False


def _argmax_and_losses(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The argmax after each hidden state, and the loss in nats (fp32) of the target: shapes (positions,)."""
    head: Any = model.get_output_embeddings()
    best, losses = [], []
    for part, target in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
        logits = head(part).float()
        best.append(logits.argmax(-1))
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(best), torch.cat(losses)
