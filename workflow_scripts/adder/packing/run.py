"""How long the examples are, and what follows: max_seq_length, packing, and the packs that training reads."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, write_json, write_table
from adder.core.length_summary import summarise
from adder.core.model_config import attention_share, context_length
from adder.core.progress import Progress
from adder.packing.best_fit_decreasing import Packs, batch_padded_positions, best_fit_decreasing, one_by_one, waste
from adder.tokenization.token_table import TokenTable

STEP = 64  # tokens: GPU kernels work in tiles of 64 or 128, so lengths in between gain nothing
GOOD_FILL = 0.03  # packs that leave no more than this share of their positions empty are good enough
SEED = 42
IGNORED = -100
HISTOGRAM_BINS = 40
LISTED = 1000  # ids of dropped examples that are listed; the rest is counted
# What a candidate costs by what becomes of examples that are longer.
LONGER = {
    "drop": "are longer and dropped",
    "right": "are longer and lose their end",
    "left": "are longer and lose their beginning",
    "split": "are longer and split",
}


@dataclass(frozen=True)
class Pieces:
    """What is trained on: `tokens[i]` tokens from `starts[i]` on of example `rows[i]` (each (n,) int64).

    `labelled[i]` of them carry loss, the piece's first token never among them.
    """

    rows: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    labelled: np.ndarray


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Choose max_seq_length and packing for the tokenised training examples; write `packs.parquet` and `lengths.json`.

    A pack is three lists of equal length: `rows` (of train.arrow), `starts` (the first token in each) and
    `seq_lengths`. Raises UserError when no example remains or when the max_seq_length asked for is above the model's
    context.
    """
    table = TokenTable(inputs["tokenize"] / "train.arrow")
    config = read_json(inputs["model"] / "model" / "config.json")
    rows = sample(table.column("digest"), settings["max_examples"])
    lengths = table.column("tokens")[rows].astype(np.int64)
    labelled = table.column("labelled")[rows].astype(np.int64)
    context = context_length(inputs["model"] / "model")
    if context is None:
        raise UserError(f"{inputs['model'] / 'model' / 'config.json'} doesn't give the model's context length")
    effective_batch, truncate = settings["effective_batch"], settings["truncate"]
    limit = choose_max_seq_length(
        lengths,
        labelled,
        context,
        settings["keep_whole"],
        effective_batch,
        settings["max_seq_length"],
        packing=settings["packing"],
        truncate=truncate,
        config=config,
    )
    pieces = cut(table, rows, lengths, labelled, limit.value, truncate)
    if not len(pieces.rows):
        raise UserError(
            f"lengths.max_seq_length: {limit.value} drops every example, the shortest has {lengths.min()} tokens"
        )
    packing = choose_packing(pieces.tokens, limit.value, effective_batch, settings["packing"])
    packs = make_packs(pieces.tokens, limit.value) if packing.value else one_by_one(len(pieces.rows))
    write_table(out / "packs.parquet", pack_table(pieces, packs))
    tokens = int(pieces.tokens.sum())
    positions = (
        len(packs) * limit.value if packing.value else batch_padded_positions(pieces.tokens, effective_batch, SEED)
    )
    counts, edges = np.histogram(lengths, bins=_histogram_edges(lengths))
    gone = np.setdiff1d(rows, pieces.rows)
    write_json(
        out / "lengths.json",
        {
            "tokens": summarise(lengths),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "context": context,
            "max_seq_length": limit.to_dict(),
            "packing": packing.to_dict(),
            "available": len(table),
            "examples": len(pieces.rows),
            "packs": len(packs),
            "examples_per_pack": round(len(pieces.rows) / len(packs), 3),
            "fill": round(1 - waste(tokens, positions), 4),
            "total_tokens": tokens,
            "labelled_tokens": int(pieces.labelled.sum()),
            "truncation": describe_truncation(lengths, labelled, pieces, limit.value, truncate),
            "dropped": len(gone),
            "dropped_ids": table.ids(gone[:LISTED]),
        },
    )
    progress.say(f"max_seq_length: {limit.reason}")
    progress.say(f"packing: {packing.reason}")
    return {
        "max_seq_length": limit.value,
        "packing": packing.value,
        "examples": len(pieces.rows),
        "dropped": len(gone),
        "packs": len(packs),
    }


def sample(digests: np.ndarray, most: int | None) -> np.ndarray:
    """Rows of at most `most` examples, in their order: those with the smallest digests.

    They are spread over the data, the same ones every time, and another row added displaces one of them at most.
    """
    if most is None or most >= len(digests):
        return np.arange(len(digests))
    return np.sort(np.argsort(digests, kind="stable")[:most])


def cut(
    table: TokenTable, rows: np.ndarray, lengths: np.ndarray, labelled: np.ndarray, max_seq_length: int, truncate: str
) -> Pieces:
    """Make every example fit: those that are longer are dropped, cut at one end, or split, as `truncate` says.

    A piece without any token that carries loss would teach nothing and is left out.
    """
    whole = lengths <= max_seq_length
    pieces = [(rows[whole], np.zeros(whole.sum(), dtype=np.int64), lengths[whole], labelled[whole])]
    if truncate != "drop":
        long = [
            (row, start, end - start, int((table.labels(row)[start + 1 : end] != IGNORED).sum()))
            for row, length in zip(rows[~whole].tolist(), lengths[~whole].tolist(), strict=True)
            for start, end in _borders(length, max_seq_length, truncate)
        ]
        if long:
            pieces.append(tuple(np.array(column, dtype=np.int64) for column in zip(*long, strict=True)))
    joined = [np.concatenate(column) for column in zip(*pieces, strict=True)]
    order = np.lexsort((joined[1], joined[0]))
    order = order[joined[3][order] > 0]
    return Pieces(*(column[order] for column in joined))


def _borders(length: int, most: int, truncate: str) -> list[tuple[int, int]]:
    """Which part(s) of an example of `length` tokens, more than `most`, are kept."""
    if truncate == "right":
        return [(0, most)]
    if truncate == "left":
        return [(length - most, length)]
    return [(start, min(start + most, length)) for start in range(0, length, most)]


def describe_truncation(
    lengths: np.ndarray, labelled: np.ndarray, pieces: Pieces, max_seq_length: int, truncate: str
) -> dict:
    """What became of examples that are too long: {mode, examples, tokens_lost, labelled_lost, share, sentence}."""
    longer = int((lengths > max_seq_length).sum())
    tokens = int(lengths.sum() - pieces.tokens.sum())
    lost = int(labelled.sum() - pieces.labelled.sum())
    share = lost / max(1, int(labelled.sum()))
    sentence = f"no example is longer than {max_seq_length:,} tokens"
    if longer:
        sentence = (
            f"{_count(longer, 'example')} of {len(lengths):,} {LONGER[truncate]}: {_count(lost, 'loss-bearing token')} "
            f"({share:.2%}) {'is' if lost == 1 else 'are'} not trained on"
        )
    return {
        "mode": truncate,
        "examples": longer,
        "tokens_lost": tokens,
        "labelled_lost": lost,
        "share": share,
        "sentence": sentence,
    }


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
    lengths: np.ndarray,
    labelled: np.ndarray,
    max_seq_length: int,
    effective_batch: int,
    truncate: str = "drop",
    config: dict | None = None,
) -> dict:
    """What one max_seq_length would mean: examples and loss-bearing tokens lost, padding and packing waste.

    `attention_share`: of the model's arithmetic on the examples that fit, none of which sees another. The lost tokens
    of `truncate: right` and `left` are estimated as if loss were spread evenly over an example; split loses none but
    the first of each piece.
    """
    whole = lengths <= max_seq_length
    if truncate == "drop":
        kept, lost = lengths[whole], int(labelled[~whole].sum())
    else:
        longer = lengths[~whole]
        parts = -(-longer // max_seq_length)
        rest = longer - (parts - 1) * max_seq_length
        full = np.full(int((parts - 1).sum()) if truncate == "split" else len(longer), max_seq_length)
        kept = np.concatenate([lengths[whole], full, rest if truncate == "split" else rest[:0]])
        share = (parts - 1) / longer if truncate == "split" else 1 - max_seq_length / longer
        lost = round(float((labelled[~whole] * share).sum()))
    tokens = int(kept.sum())
    packs = len(best_fit_decreasing(kept, max_seq_length))
    row = {
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
    share = attention_share(config or {}, kept)
    return row if share is None else row | {"attention_share": share}


def choose_max_seq_length(
    lengths: np.ndarray,
    labelled: np.ndarray,
    context: int,
    keep_whole: float,
    effective_batch: int,
    requested: int | str,
    packing: bool | str = "auto",
    truncate: str = "drop",
    config: dict | None = None,
) -> Choice:
    """Choose the longest sequence in tokens; the alternatives are the candidates with what each would cost.

    `auto`: the smallest candidate that keeps at least the share `keep_whole` of the examples whole (all of them, where
    that takes at most twice the length), and whose packs leave at most 3 % of their positions empty. A pack may hold no
    more than `effective_batch` examples on average, else one optimizer step would see more than asked for. Where no
    candidate packs that well, the best that does pack within that limit. `packing` False leaves packs out of it.
    `lengths` and `labelled`: (n,) tokens and loss-bearing tokens an example; `config`: the model's config.json.
    Raises UserError for a requested length above `context`.
    """
    if requested != "auto":
        if requested > context:
            raise UserError(
                f"lengths.max_seq_length: {requested} tokens asked for, but the model's context is {context}"
            )
        row = weigh(lengths, labelled, requested, effective_batch, truncate, config)
        reason = f"{requested} tokens, as set in the configuration; {_cost(row, lengths, truncate)}"
        return Choice(requested, reason, [row])
    rows = []
    for candidate in ladder(context):
        rows.append(weigh(lengths, labelled, candidate, effective_batch, truncate, config))
        if not rows[-1]["examples_truncated"] and rows[-1]["examples_per_pack"] > effective_batch:
            break  # longer ones keep no more examples and only put more of them into a step
    enough = [row for row in rows if row["share_whole"] >= keep_whole]
    if not enough:
        row = rows[-1]
        reason = f"{row['max_seq_length']} tokens, as long as the model's context of {context} allows; "
        return Choice(row["max_seq_length"], reason + _cost(row, lengths, truncate), rows)
    smallest = enough[0]
    everything = [row for row in enough if not row["examples_truncated"]]
    if everything and everything[0]["max_seq_length"] <= 2 * smallest["max_seq_length"]:
        smallest = everything[0]
    chosen, why = smallest, ""
    if packing is not False:
        longer = [row for row in rows if row["max_seq_length"] >= smallest["max_seq_length"]]
        chosen, why = _best_packed(longer, effective_batch)
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


def _cost(row: dict, lengths: np.ndarray, truncate: str) -> str:
    longer = row["examples_truncated"]
    if not longer:
        return f"{_count(len(lengths), 'example')}, all kept whole (the longest has {lengths.max():,} tokens)"
    return (
        f"{row['share_whole']:.1%} of the examples stay whole, {longer:,} of {len(lengths):,} {LONGER[truncate]}, "
        f"with {row['labelled_share_lost']:.1%} of the loss-bearing tokens lost"
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
        "packed": len(packs) * max_seq_length,
        "batches padded to their longest": batch_padded_positions(lengths, effective_batch, SEED),
        "padded to max_seq_length": len(lengths) * max_seq_length,
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


def make_packs(lengths: np.ndarray, max_seq_length: int) -> Packs:
    """Packs in a shuffled order (fixed seed): as packed they would come sorted by length, long examples first."""
    packs = best_fit_decreasing(lengths, max_seq_length)
    return packs.take(np.random.default_rng(SEED).permutation(len(packs)))


def pack_table(pieces: Pieces, packs: Packs) -> pa.Table:
    """One row a pack: its pieces' `rows`, `starts` and `seq_lengths` (tokens), lists of int32."""
    borders = pa.array(packs.borders, pa.int32())
    columns = {"rows": pieces.rows, "starts": pieces.starts, "seq_lengths": pieces.tokens}
    return pa.table(
        {
            name: pa.ListArray.from_arrays(borders, pa.array(values[packs.order], pa.int32()))
            for name, values in columns.items()
        }
    )


def _histogram_edges(lengths: np.ndarray) -> np.ndarray:
    """Whole-numbered edges, all bins of one width, the last including the longest example."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / HISTOGRAM_BINS))
    return np.arange(low, high + width + 1, width)
