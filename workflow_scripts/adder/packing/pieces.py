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
