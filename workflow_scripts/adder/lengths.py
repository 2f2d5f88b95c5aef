"""How long the examples are, and what follows: max_seq_length, packing, and the packs that training reads."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from adder.choice import Choice
from adder.context import context_length
from adder.errors import UserError
from adder.files import read_table, write_json, write_table
from adder.packing import (
    batch_padded_positions,
    best_fit_decreasing,
    packed_positions,
    padded_positions,
    waste,
)
from adder.progress import Progress
from adder.quantiles import summarise

STEP = 64  # tokens: GPU kernels work in tiles of 64 or 128, so lengths in between gain nothing
GOOD_FILL = 0.03  # packs that leave no more than this share of their positions empty are good enough
SEED = 42
IGNORED = -100
HISTOGRAM_BINS = 40


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Choose max_seq_length and packing for the tokenised training examples; write `packs.parquet` and `lengths.json`.

    Examples longer than max_seq_length are dropped and listed, never cut. Raises UserError when none remains or when
    the max_seq_length asked for is above the model's context.
    """
    available = read_table(inputs["tokenize"] / "train.parquet")
    examples = sample(available, settings["max_examples"])
    lengths, labelled = measure(examples)
    context = context_length(inputs["model"] / "model")
    if context is None:
        raise UserError(f"{inputs['model'] / 'model' / 'config.json'} doesn't give the model's context length")
    effective_batch = settings["effective_batch"]
    limit = choose_max_seq_length(
        lengths,
        labelled,
        context,
        settings["keep_whole"],
        effective_batch,
        settings["max_seq_length"],
        packing=settings["packing"],
    )
    kept = np.flatnonzero(lengths <= limit.value)
    if not len(kept):
        raise UserError(
            f"lengths.max_seq_length: {limit.value} drops every example, the shortest has {lengths.min()} tokens"
        )
    packing = choose_packing(lengths[kept], limit.value, effective_batch, settings["packing"])
    packs = make_packs(lengths[kept], limit.value) if packing.value else [[index] for index in range(len(kept))]
    write_table(out / "packs.parquet", pack_table(examples, lengths, [kept[pack] for pack in packs]))
    tokens = int(lengths[kept].sum())
    positions = (
        packed_positions(packs, limit.value)
        if packing.value
        else batch_padded_positions(lengths[kept], effective_batch, SEED)
    )
    counts, edges = np.histogram(lengths, bins=_histogram_edges(lengths))
    ids = examples.column("id").to_pylist()
    write_json(
        out / "lengths.json",
        {
            "tokens": summarise(lengths),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "context": context,
            "max_seq_length": limit.to_dict(),
            "packing": packing.to_dict(),
            "available": len(available),
            "examples": len(kept),
            "packs": len(packs),
            "examples_per_pack": round(len(kept) / len(packs), 3),
            "fill": round(1 - waste(tokens, positions), 4),
            "total_tokens": tokens,
            "labelled_tokens": int(labelled[kept].sum()),
            "dropped": [ids[index] for index in np.flatnonzero(lengths > limit.value)],
        },
    )
    progress.say(f"max_seq_length: {limit.reason}")
    progress.say(f"packing: {packing.reason}")
    return {
        "max_seq_length": limit.value,
        "packing": packing.value,
        "examples": len(kept),
        "dropped": len(lengths) - len(kept),
        "packs": len(packs),
    }


def sample(examples: pa.Table, most: int | None) -> pa.Table:
    """At most `most` examples, in their order: those whose tokens have the smallest digests.

    They are spread over the data, the same ones every time, and another row added displaces one of them at most.
    """
    if most is None or most >= len(examples):
        return examples
    ids = examples.column("input_ids").to_pylist()
    digests = [hashlib.blake2b(np.asarray(row, dtype=np.int32).tobytes(), digest_size=8).digest() for row in ids]
    return examples.take(sorted(sorted(range(len(ids)), key=lambda index: (digests[index], index))[:most]))


def measure(examples: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss-bearing tokens of each example. The first token never bears loss: nothing predicts it."""
    lengths = np.asarray(examples.column("input_ids").combine_chunks().value_lengths(), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    bears_loss = np.asarray(examples.column("labels").combine_chunks().flatten()) != IGNORED
    bears_loss[starts] = False
    return lengths, np.add.reduceat(bears_loss.astype(np.int64), starts)


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


def weigh(lengths: np.ndarray, labelled: np.ndarray, max_seq_length: int, effective_batch: int) -> dict:
    """What one max_seq_length would mean: examples and loss-bearing tokens lost, padding and packing waste."""
    whole = lengths <= max_seq_length
    kept, tokens = lengths[whole], int(lengths[whole].sum())
    packs = len(best_fit_decreasing(kept, max_seq_length))
    lost = int(labelled[~whole].sum())
    return {
        "max_seq_length": max_seq_length,
        "examples_truncated": int((~whole).sum()),
        "share_whole": float(whole.mean()),
        "labelled_tokens_lost": lost,
        "labelled_share_lost": lost / max(1, int(labelled.sum())),
        "padding_waste": waste(tokens, batch_padded_positions(kept, effective_batch, SEED)),
        "packs": packs,
        "packing_waste": waste(tokens, packs * max_seq_length),
        "examples_per_pack": len(kept) / packs if packs else 0.0,
    }


def choose_max_seq_length(
    lengths: np.ndarray,
    labelled: np.ndarray,
    context: int,
    keep_whole: float,
    effective_batch: int,
    requested: int | str,
    packing: bool | str = "auto",
) -> Choice:
    """Choose the longest sequence in tokens; the alternatives are the candidates with what each would cost.

    `auto`: the smallest candidate that keeps at least the share `keep_whole` of the examples whole (all of them, where
    that takes at most twice the length), and whose packs leave at most 3 % of their positions empty. A pack may hold no
    more than `effective_batch` examples on average, else one optimizer step would see more than asked for. Where no
    candidate packs that well, the best that does pack within that limit. `packing` False leaves packs out of it.
    `lengths` and `labelled`: (n,) tokens and loss-bearing tokens an example.
    Raises UserError for a requested length above `context`.
    """
    if requested != "auto":
        if requested > context:
            raise UserError(
                f"lengths.max_seq_length: {requested} tokens asked for, but the model's context is {context}"
            )
        row = weigh(lengths, labelled, requested, effective_batch)
        return Choice(requested, f"{requested} tokens, as set in the configuration; {_cost(row, lengths)}", [row])
    rows = []
    for candidate in ladder(context):
        rows.append(weigh(lengths, labelled, candidate, effective_batch))
        if not rows[-1]["examples_truncated"] and rows[-1]["examples_per_pack"] > effective_batch:
            break  # longer ones keep no more examples and only put more of them into a step
    enough = [row for row in rows if row["share_whole"] >= keep_whole]
    if not enough:
        row = rows[-1]
        reason = f"{row['max_seq_length']} tokens, as long as the model's context of {context} allows; "
        return Choice(row["max_seq_length"], reason + _cost(row, lengths), rows)
    smallest = enough[0]
    everything = [row for row in enough if not row["examples_truncated"]]
    if everything and everything[0]["max_seq_length"] <= 2 * smallest["max_seq_length"]:
        smallest = everything[0]
    chosen, why = smallest, ""
    if packing is not False:
        longer = [row for row in rows if row["max_seq_length"] >= smallest["max_seq_length"]]
        chosen, why = _best_packed(longer, effective_batch)
    shorter = [row for row in rows if row["max_seq_length"] < smallest["max_seq_length"]]
    reason = f"{chosen['max_seq_length']} tokens: {_cost(chosen, lengths)}{why}"
    if shorter and chosen is smallest:
        row = shorter[-1]
        reason += (
            f"; {row['max_seq_length']} tokens would drop {row['examples_truncated']:,} "
            f"with {row['labelled_share_lost']:.1%} of the loss-bearing tokens"
        )
    return Choice(chosen["max_seq_length"], reason, rows)


def _best_packed(rows: list[dict], effective_batch: int) -> tuple[dict, str]:
    """Of candidates in rising order, the first that packs well, else the one that packs best; with the reason."""
    smallest = rows[0]
    allowed = [row for row in rows if row["examples_per_pack"] <= effective_batch]
    if not allowed:
        return smallest, (
            f"; a pack holds {smallest['examples_per_pack']:.1f} examples on average, more than the effective batch "
            f"of {effective_batch}"
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
        why += f"; longer packs would hold more examples than the {effective_batch} of an optimizer step"
    return chosen, why


def _cost(row: dict, lengths: np.ndarray) -> str:
    dropped = row["examples_truncated"]
    if not dropped:
        return f"{_count(len(lengths), 'example')}, all kept whole (the longest has {lengths.max():,} tokens)"
    return (
        f"{row['share_whole']:.1%} of the examples stay whole, {dropped:,} of {len(lengths):,} are longer and dropped, "
        f"with {row['labelled_share_lost']:.1%} of the loss-bearing tokens"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def choose_packing(
    lengths: np.ndarray, max_seq_length: int, effective_batch: int, requested: bool | str = "auto"
) -> Choice:
    """Choose whether to pack: when packs waste fewer positions than real batches padded to their longest example do.

    `lengths`: (n,) tokens an example, none above `max_seq_length`. The batches are shuffled ones of `effective_batch`.
    """
    tokens = int(lengths.sum())
    packs = best_fit_decreasing(lengths, max_seq_length)
    layouts = {
        "packed": packed_positions(packs, max_seq_length),
        "batches padded to their longest": batch_padded_positions(lengths, effective_batch, SEED),
        "padded to max_seq_length": padded_positions(lengths, max_seq_length),
    }
    alternatives = [
        {"layout": name, "packing": name == "packed", "positions": positions, "waste": waste(tokens, positions)}
        for name, positions in layouts.items()
    ]
    packed, batched, padded = (row["waste"] for row in alternatives)
    numbers = (
        f"{_count(len(lengths), 'example')} fit into {_count(len(packs), 'sequence')} of {max_seq_length} tokens with "
        f"{packed:.1%} of the positions empty; one by one, batches of {effective_batch} padded to their longest "
        f"example would leave {batched:.1%} empty, padding each to {max_seq_length} tokens {padded:.1%}"
    )
    if requested != "auto":
        return Choice(
            requested, f"{'on' if requested else 'off'}, as set in the configuration: {numbers}", alternatives
        )
    if len(packs) == len(lengths):
        return Choice(False, f"off: no two examples fit into one sequence of {max_seq_length} tokens", alternatives)
    value = packed < batched
    return Choice(value, f"{'on' if value else 'off'}: {numbers}", alternatives)


def make_packs(lengths: np.ndarray, max_seq_length: int) -> list[list[int]]:
    """Packs in a shuffled order (fixed seed): as packed they would come sorted by length, long examples first."""
    packs = best_fit_decreasing(lengths, max_seq_length)
    return [packs[index] for index in np.random.default_rng(SEED).permutation(len(packs))]


def pack_table(examples: pa.Table, lengths: np.ndarray, packs: list[np.ndarray] | list[list[int]]) -> pa.Table:
    """One row a pack: its examples' `input_ids` and `labels` joined, and their `seq_lengths`, all int32.

    The first label of every example is -100, since the token that would predict it belongs to another example.
    `packs` holds row numbers of `examples`; `lengths` has the tokens of every row.
    """
    order = np.concatenate([np.asarray(pack, dtype=np.int64) for pack in packs])
    in_pack = np.cumsum([0, *(len(pack) for pack in packs)])
    ends = np.concatenate([[0], np.cumsum(lengths[order])])
    borders = pa.array(ends[in_pack], pa.int32())
    ids = examples.column("input_ids").combine_chunks().take(pa.array(order)).flatten()
    labels = np.array(examples.column("labels").combine_chunks().take(pa.array(order)).flatten())
    labels[ends[:-1]] = IGNORED
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(borders, ids),
            "labels": pa.ListArray.from_arrays(borders, pa.array(labels, pa.int32())),
            "seq_lengths": pa.ListArray.from_arrays(
                pa.array(in_pack, pa.int32()), pa.array(lengths[order], pa.int32())
            ),
        }
    )


def _histogram_edges(lengths: np.ndarray) -> np.ndarray:
    """Whole-numbered edges, all bins of one width, the last including the longest example."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / HISTOGRAM_BINS))
    return np.arange(low, high + width + 1, width)
