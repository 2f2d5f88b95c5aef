"""How long a sequence may get: candidates, what each would cost, and the choice among them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.model_config import attention_share
from adder.packing.best_fit_decreasing import batch_padded_positions, best_fit_decreasing, waste
from adder.packing.records import LengthCandidate
from adder.packing.stage import LengthsSettings
from adder.packing.wording import LONGER, Truncate, counted

STEP = 64  # tokens: GPU kernels work in tiles of 64 or 128, so lengths in between gain nothing
GOOD_FILL = 0.03  # packs that leave no more than this share of their positions empty are good enough

Integers = npt.NDArray[np.int64]
CountLost = Callable[[list[int]], Integers]


def choose_max_seq_length(
    lengths: Integers,
    labelled: Integers,
    context: int,
    settings: LengthsSettings,
    config: dict[str, Any] | None = None,
    count_lost: CountLost | None = None,
) -> Choice[int, LengthCandidate]:
    """Choose the longest sequence in tokens; the alternatives are the candidates with what each would cost.

    `auto`: the smallest candidate that keeps at least the share `keep_whole` of the examples whole (all of them, where
    that takes at most twice the length), and whose packs leave at most 3 % of their positions empty. A pack may hold no
    more than `effective_batch_size` examples on average, else one optimizer step would see more than asked for. Where
    no candidate packs that well, the best that does pack within that limit. `packing` False leaves packs out of it.

    lengths, labelled: (n,) tokens and loss-bearing tokens an example. context: of the model, in tokens. config: the
    model's config.json. Raises UserError for a requested length above `context`.
    """
    requested, truncate, batch = settings.max_seq_length, settings.truncate, settings.effective_batch_size
    if requested != "auto":
        if requested > context:
            raise UserError(
                f"lengths.max_seq_length: {requested} tokens asked for, but the model's context is {context}"
            )
        row = weigh(lengths, labelled, requested, batch, truncate, config, _lost(count_lost, [requested])[0])
        reason = f"{requested} tokens, as set in the configuration; {_cost(row, lengths, truncate)}"
        return Choice(requested, reason, [row])
    rows: list[LengthCandidate] = []
    candidates = ladder(context)
    for candidate, lost in zip(candidates, _lost(count_lost, candidates), strict=True):
        rows.append(weigh(lengths, labelled, candidate, batch, truncate, config, lost))
        if not rows[-1]["examples_truncated"] and rows[-1]["examples_per_pack"] > batch:
            break  # longer ones keep no more examples and only put more of them into a step
    enough = [row for row in rows if row["share_whole"] >= settings.keep_whole]
    if not enough:
        row = rows[-1]
        reason = f"{row['max_seq_length']} tokens, as long as the model's context of {context} allows; "
        return Choice(row["max_seq_length"], reason + _cost(row, lengths, truncate), rows)
    smallest = enough[0]
    everything = [row for row in enough if not row["examples_truncated"]]
    if everything and everything[0]["max_seq_length"] <= 2 * smallest["max_seq_length"]:
        smallest = everything[0]
    chosen, why = smallest, ""
    if settings.packing is not False:
        longer = [row for row in rows if row["max_seq_length"] >= smallest["max_seq_length"]]
        chosen, why = _best_packed(longer, batch)
    shorter = [row for row in rows if row["max_seq_length"] < smallest["max_seq_length"]]
    reason = f"{chosen['max_seq_length']} tokens: {_cost(chosen, lengths, truncate)}{why}"
    if shorter and chosen is smallest:
        row = shorter[-1]
        reason += (
            f"; {row['max_seq_length']} tokens would {'drop' if truncate == 'drop' else 'cut'} "
            f"{row['examples_truncated']:,} with {row['labelled_share_lost']:.1%} of the loss-bearing tokens"
        )
    if "attention_share" in chosen:
        reason += f"; attention is {chosen['attention_share']:.1%} of the arithmetic"
    return Choice(chosen["max_seq_length"], reason, rows)


def _lost(count_lost: CountLost | None, limits: list[int]) -> list[int | None]:
    return [None] * len(limits) if count_lost is None else [int(count) for count in count_lost(limits)]


def ladder(context: int) -> list[int]:
    """Candidates for max_seq_length: multiples of 64, each a power of two or one and a half of one, up to `context`."""
    steps = [STEP]
    while steps[-1] < context:
        power = 2 ** int(math.log2(steps[-1]))
        half_way = power * 3 // 2
        steps.append(half_way if steps[-1] == power and half_way % STEP == 0 else 2 * power)
    below = [step for step in steps if step <= context]
    last = context // STEP * STEP or context
    return below if last in below else [*below, last]


def weigh(
    lengths: Integers,
    labelled: Integers,
    max_seq_length: int,
    effective_batch_size: int,
    truncate: Truncate = "drop",
    config: dict[str, Any] | None = None,
    lost: int | None = None,
) -> LengthCandidate:
    """What one max_seq_length would mean: examples and loss-bearing tokens lost, padding and packing waste.

    lost: loss-bearing tokens that are lost where examples are cut. `attention_share`: of the model's arithmetic on the
    examples that fit, none of which sees another.
    """
    fits = lengths <= max_seq_length
    if truncate == "drop":
        kept, gone = lengths[fits], int(labelled[~fits].sum())
    else:
        longer = lengths[~fits]
        parts = -(-longer // max_seq_length)
        rest = longer - (parts - 1) * max_seq_length
        full = np.full(int((parts - 1).sum()) if truncate == "split" else len(longer), max_seq_length)
        kept = np.concatenate([lengths[fits], full, rest if truncate == "split" else rest[:0]])
        assert lost is not None
        gone = lost
    tokens = int(kept.sum())
    packs = len(best_fit_decreasing(kept, max_seq_length))
    row: LengthCandidate = {
        "max_seq_length": max_seq_length,
        "examples_truncated": int((~fits).sum()),
        "share_whole": float(fits.mean()),
        "labelled_tokens_lost": gone,
        "labelled_share_lost": gone / max(1, int(labelled.sum())),
        "padding_waste": waste(tokens, batch_padded_positions(kept, effective_batch_size)),
        "packs": packs,
        "packing_waste": waste(tokens, packs * max_seq_length),
        "examples_per_pack": len(kept) / packs if packs else 0.0,
    }
    attention = attention_share(config or {}, kept)
    if attention is not None:
        row["attention_share"] = attention
    return row


def _best_packed(rows: list[LengthCandidate], effective_batch_size: int) -> tuple[LengthCandidate, str]:
    """Of candidates in rising order, the first that packs well, else the one that packs best; with the reason."""
    smallest = rows[0]
    allowed = [row for row in rows if row["examples_per_pack"] <= effective_batch_size]
    if not allowed:
        return smallest, (
            f"; a pack holds {smallest['examples_per_pack']:.1f} examples on average, more than the effective batch "
            f"of {effective_batch_size}"
        )
    if all(row["examples_per_pack"] == 1 for row in allowed):
        return smallest, ""
    good = [row for row in allowed if row["packing_waste"] <= GOOD_FILL]
    chosen = good[0] if good else min(allowed, key=lambda row: (row["packing_waste"], row["max_seq_length"]))
    why = (
        f"; packs of {chosen['examples_per_pack']:.1f} examples leave {chosen['packing_waste']:.1%} of the "
        "positions empty"
    )
    if chosen is not smallest:
        why += f", where packs of {smallest['max_seq_length']} tokens would leave {smallest['packing_waste']:.1%}"
    tighter = [row for row in rows if row["packing_waste"] < chosen["packing_waste"]]
    if not good and tighter:  # none of them is allowed, else it would have been chosen
        why += f"; longer packs would hold more examples than the {effective_batch_size} of an optimizer step"
    return chosen, why


def _cost(row: LengthCandidate, lengths: Integers, truncate: Truncate) -> str:
    longer = row["examples_truncated"]
    if not longer:
        return f"{counted(len(lengths), 'example')}, all kept whole (the longest has {lengths.max():,} tokens)"
    return (
        f"{row['share_whole']:.1%} of the examples stay whole, {longer:,} of {len(lengths):,} {LONGER[truncate]}, "
        f"with {row['labelled_share_lost']:.1%} of the loss-bearing tokens lost"
    )
