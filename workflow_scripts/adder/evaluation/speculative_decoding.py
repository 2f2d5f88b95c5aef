"""Greedy replies to many prompts at once, without the work that a generation loop usually does in vain.

1. A request may bring a guess at its reply. The guess is read in the same pass as the prompt, and the reply is the
   guess as far as the model would have written it itself, token for token, then what the model writes instead: greedy
   speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with a draft that is given. A held-out row's reference
   is such a guess, so the pass that measures the loss on it is the beginning of the generation as well, and a reply
   that equals its reference takes no further pass.
2. Each reply has a slot in a cache of fixed size. A reply that ends leaves its slot at once, and a waiting prompt takes
   it: nothing is computed for replies that have ended, and none waits for the longest of a batch.
3. What all prompts begin with, a system prompt say, is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from adder.evaluation.kv_cache_slots import Slots
from adder.kernels.labelled_loss import has_plain_head

IGNORED = -100
PREFILL_TOKENS = 4096  # positions of one pass over prompts, padding included
HEAD_ROWS = 1024  # positions whose logits are computed at once
BY_PLACE = ("default", "linear", "llama3", "yarn", "proportional")  # rotary positions that see nothing else
REFILL_SHARE = 0.25  # of the slots must be free before prompts are read: one pass for several


@dataclass
class Request:
    """One prompt to reply to: `ids` are the prompt's `prompt` tokens, then the guess at the reply, which may be empty.

    `labels`, where a loss is wanted too, as for training: -100, or the token itself, at each place of `ids`.
    """

    ids: Sequence[int]
    prompt: int
    labels: Sequence[int] | None = None


@dataclass
class Reply:
    """New token ids, the ending one included; whether there is one; losses (nats, fp32) at the request's labels."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    losses: torch.Tensor | None = None

    def is_done(self, limit: int) -> bool:
        """Whether no further token comes: it has ended, or has `limit` tokens."""
        return self.ended or len(self.ids) >= limit


def supports(model: PreTrainedModel) -> bool:
    """Whether `reply` can run the model: rotary positions, a plain LM head, and full attention in every layer.

    A sliding window, a recurrent state or ALiBi need more of a cache than keys and values by position; "dynamic" and
    "longrope" positions depend on the longest row of a batch.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_place = rope.get("rope_type") in BY_PLACE and not getattr(config, "alibi", False)
    layers = DynamicCache(config=model.config).layers
    return by_place and has_plain_head(model) and all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def reply(
    model: PreTrainedModel,
    requests: list[Request],
    stop_ids: Sequence[int],
    limit: int,
    slots: int,
    watch: Callable[[list[Reply]], None],
) -> list[Reply]:
    """Reply to each request by the likeliest token each time, up to one of `stop_ids` or `limit` tokens.

    At most `slots` replies are written at a time. `watch` is called with all replies before each pass and at the end.
    """
    found = [Reply() for _ in requests]
    stops = set(stop_ids)
    cache = Slots(model, min(slots, len(requests)), max(request.prompt for request in requests) + limit)
    prefix = read_prefix(model, requests[0].ids[: common_prefix(requests)])
    # Longest first: neighbours need little padding.
    waiting = sorted(range(len(requests)), key=lambda index: (-len(requests[index].ids), index))
    while waiting or cache.rows:
        watch(found)
        free = cache.count - len(cache.rows)
        if waiting and free >= REFILL_SHARE * cache.count:
            size = min(free, rows_at_once(len(requests[waiting[0]].ids), prefix.get_seq_length()))
            batch, waiting = waiting[:size], waiting[size:]
            keys_and_values = _read(model, prefix, requests, batch, found, stops, limit)
            going_on = [number for number, row in enumerate(batch) if not found[row].is_done(limit)]
            lengths = [requests[batch[number]].prompt + len(found[batch[number]].ids) - 1 for number in going_on]
            cache.add([batch[number] for number in going_on], lengths, going_on, keys_and_values)
            continue
        tokens = cache.step([found[row].ids[-1] for row in cache.rows])
        for row, token in zip(cache.rows, tokens, strict=True):
            found[row].ids.append(token)
            found[row].ended = token in stops
        cache.keep([not found[row].is_done(limit) for row in cache.rows])
    watch(found)
    return found


def common_prefix(requests: list[Request]) -> int:
    """How many tokens all requests begin with, short of what predicts a label or the first token of a reply."""
    length = min(request.prompt for request in requests) - 1
    for request in requests:
        length = next((i for i in range(length) if request.ids[i] != requests[0].ids[i]), length)
        if request.labels is not None:
            length = next((i - 1 for i in range(1, length + 1) if request.labels[i] != IGNORED), length)
    return length


def rows_at_once(length: int, prefix: int) -> int:
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
    """One pass over prompts and guesses: fills in losses and what is right of each guess; returns keys and values."""
    own = [requests[row] for row in batch]
    hidden, cache = _run(model, prefix, [request.ids for request in own])
    start = prefix.get_seq_length()
    places = [predicting_places(request, limit) for request in own]
    picked = torch.cat([hidden[number, [place - start for place in at]] for number, at in enumerate(places)])
    pairs = [(request.ids, place + 1) for request, at in zip(own, places, strict=True) for place in at]
    targets = torch.tensor([ids[place] if place < len(ids) else 0 for ids, place in pairs], device=model.device)
    sizes = [len(at) for at in places]
    best, losses = (values.split(sizes) for values in _judge(model, picked, targets))
    for number, (row, request, at) in enumerate(zip(batch, own, places, strict=True)):
        likeliest = dict(zip(at, best[number].tolist(), strict=True))
        labelled = [index for index, place in enumerate(at) if _is_label(request, place + 1)]
        found[row] = Reply(*written(request, likeliest, stops, limit), losses[number][labelled])
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
        cache.update(layer.keys.expand(len(rows), -1, -1, -1), layer.values.expand(len(rows), -1, -1, -1), number)
    output = model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    return output.last_hidden_state, cache


def predicting_places(request: Request, limit: int) -> list[int]:
    """Places of a request whose next token matters: it carries a label, or may be one of the reply."""
    places = set(range(request.prompt - 1, min(len(request.ids), request.prompt + limit - 1)))
    return sorted(places | {index - 1 for index in range(1, len(request.ids)) if _is_label(request, index)})


def _is_label(request: Request, place: int) -> bool:
    return request.labels is not None and place < len(request.ids) and request.labels[place] != IGNORED


def written(request: Request, likeliest: dict[int, int], stops: set[int], limit: int) -> tuple[list[int], bool]:
    """What the model writes as far as the pass over the guess tells, and whether that ends the reply.

    `likeliest`: the likeliest next token after each place. It counts as long as all before it is what was guessed.
    """
    ids = []
    for place in range(request.prompt - 1, request.prompt + limit - 1):
        ids.append(likeliest[place])
        if ids[-1] in stops:
            return ids, True
        if place + 1 >= len(request.ids) or ids[-1] != request.ids[place + 1]:
            break
    return ids, False


def _judge(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token after each hidden state, and the loss in nats (fp32) of the target: shapes (places,)."""
    head = model.get_output_embeddings()
    best, losses = [], []
    for part, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(part).float()
        best.append(logits.argmax(-1))
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(best), torch.cat(losses)
