"""Which examples are trained on, and which part of each: sampled where fewer are asked for, cut where they are long."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adder.core.labels import IGNORE_INDEX
from adder.packing.records import Truncation
from adder.packing.wording import LONGER, Truncate, counted
from adder.tokenization.token_table import TokenTable

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """What is trained on: `tokens[i]` tokens from `starts[i]` on of example `rows[i]` (each (n,) int64).

    `labelled[i]` of them carry loss, the piece's first token never among them.
    """

    rows: Integers
    starts: Integers
    tokens: Integers
    labelled: Integers


def sample(digests: Integers, most: int | None) -> Integers:
    """Rows of at most `most` examples, in their order: those with the smallest digests.

    They are spread over the data, the same ones every time, and another row added displaces one of them at most.
    """
    if most is None or most >= len(digests):
        return np.arange(len(digests))
    return np.sort(np.argsort(digests, kind="stable")[:most])


def cut(
    table: TokenTable, rows: Integers, lengths: Integers, labelled: Integers, max_seq_length: int, truncate: Truncate
) -> Pieces:
    """Make every example fit: those that are longer are dropped, cut at one end, or split, as `truncate` says.

    rows, lengths, labelled: (n,) rows of `table`, and tokens and loss-bearing tokens of each. A piece without any token
    that carries loss would teach nothing and is left out.
    """
    fits = lengths <= max_seq_length
    kept = np.stack([rows[fits], np.zeros(int(fits.sum()), dtype=np.int64), lengths[fits], labelled[fits]])
    if truncate != "drop":
        long = [
            (row, start, end - start, int((table.labels(row)[start + 1 : end] != IGNORE_INDEX).sum()))
            for row, length in zip(rows[~fits].tolist(), lengths[~fits].tolist(), strict=True)
            for start, end in _kept_parts(length, max_seq_length, truncate)
        ]
        kept = np.concatenate([kept, np.array(long, dtype=np.int64).reshape(-1, 4).T], axis=1)
    order = np.lexsort((kept[1], kept[0]))
    order = order[kept[3][order] > 0]
    return Pieces(*kept[:, order])


def count_lost(table: TokenTable, rows: Integers, limits: list[int], truncate: Truncate) -> Integers:
    """Loss-bearing tokens that each of some max_seq_length would lose, int64 (limits,), as `cut` would cut the rows."""
    chosen = np.zeros(len(table), dtype=bool)
    chosen[rows] = True
    lost = np.zeros(len(limits), dtype=np.int64)
    for first, carries, borders in table.loss_batches():
        before = np.concatenate([[0], np.cumsum(carries, dtype=np.int64)])  # of the tokens before each, how many
        used = chosen[first : first + len(borders) - 1]
        starts, ends = borders[:-1][used], borders[1:][used]
        for number, limit in enumerate(limits):
            long = ends - starts > limit
            lost[number] += _lost_of(carries, before, starts[long], ends[long], limit, truncate)
    return lost


def _lost_of(
    carries: npt.NDArray[np.bool_], before: Integers, starts: Integers, ends: Integers, limit: int, truncate: Truncate
) -> int:
    """Loss-bearing tokens lost of some rows of a batch, all of which are longer than `limit`."""
    if truncate == "drop":
        return int((before[ends] - before[starts]).sum())
    if truncate == "right":
        return int((before[ends] - before[starts + limit]).sum())
    if truncate == "left":  # the first of what is kept has nothing before it
        return int((before[ends - limit + 1] - before[starts]).sum())
    cuts = (ends - starts - 1) // limit
    number = np.arange(int(cuts.sum())) - np.repeat(np.cumsum(cuts) - cuts, cuts) + 1
    return int(carries[np.repeat(starts, cuts) + number * limit].sum())


def describe_truncation(
    lengths: Integers, labelled: Integers, pieces: Pieces, max_seq_length: int, truncate: Truncate
) -> Truncation:
    """What became of examples that are too long. lengths, labelled: (n,), of all examples before they were cut."""
    longer = int((lengths > max_seq_length).sum())
    lost = int(labelled.sum() - pieces.labelled.sum())
    share = lost / max(1, int(labelled.sum()))
    sentence = f"no example is longer than {max_seq_length:,} tokens"
    if longer:
        sentence = (
            f"{counted(longer, 'example')} of {len(lengths):,} {LONGER[truncate]}: "
            f"{counted(lost, 'loss-bearing token')} ({share:.2%}) {'is' if lost == 1 else 'are'} not trained on"
        )
    return {
        "mode": truncate,
        "examples": longer,
        "tokens_lost": int(lengths.sum() - pieces.tokens.sum()),
        "labelled_lost": lost,
        "share": share,
        "sentence": sentence,
    }


def _kept_parts(length: int, most: int, truncate: Truncate) -> list[tuple[int, int]]:
    """Start and end of what is kept of an example of `length` tokens, more than `most`."""
    if truncate == "right":
        return [(0, most)]
    if truncate == "left":
        return [(length - most, length)]
    return [(start, min(start + most, length)) for start in range(0, length, most)]
