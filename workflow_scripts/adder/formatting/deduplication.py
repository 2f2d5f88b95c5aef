"""Which accepted rows are worth nothing or would spoil the evaluation: duplicates, near-duplicates, leaked prompts.

Rows are numbered in the order of the data. Each finding is arrays of one length, the rows found and the row that each
of them matches, in ascending order of the first.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from adder.core import parallel
from adder.core.stage_spec import Context
from adder.formatting.block_converter import HELDOUT, TEST, TRAIN, prompt_text
from adder.formatting.heldout_overlap import HeldoutIndex
from adder.formatting.minhash import Signatures, estimated_similarity, near_duplicates
from adder.formatting.spool import Spool

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Sides = npt.NDArray[np.int8]  # one of TRAIN, HELDOUT, TEST and UNDECIDED a row
CHUNK = 1 << 16  # rows
OVERLAP_ENOUGH = 20_000  # rows that are worth a worker


class Matches(NamedTuple):
    """Rows found, and the row that each of them matches."""

    rows: Integers
    matches: Integers


class PartialMatches(NamedTuple):
    """Rows found, the row that each of them matches, and how far: a share or similarity, 0 to 1."""

    rows: Integers
    matches: Integers
    shares: npt.NDArray[np.float64]


def find_duplicates(side: Sides, digest: Hashes) -> Matches:
    """Rows whose digest an earlier row of the same side has, and the first such row. Test rows are left alone."""
    rows = np.flatnonzero(side != TEST)
    rows = rows[np.lexsort((side[rows], digest[rows]))]  # stable: equal ones stay in order
    if not len(rows):
        return Matches(rows, rows)
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (digest[rows[1:]] != digest[rows[:-1]]) | (side[rows[1:]] != side[rows[:-1]])
    first = rows[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
    found, matches = rows[~new], first[~new]
    order = np.argsort(found)
    return Matches(found[order], matches[order])


def find_leaks(side: Sides, prompt: Hashes) -> Matches:
    """Training rows that ask what a held-out or test row asks, and the first such row."""
    held = np.flatnonzero((side == HELDOUT) | (side == TEST))
    train = np.flatnonzero(side == TRAIN)
    if not len(held):
        return Matches(train[:0], train[:0])
    prompts, first = np.unique(prompt[held], return_index=True)
    place = np.minimum(np.searchsorted(prompts, prompt[train]), len(prompts) - 1)
    found = prompts[place] == prompt[train]
    return Matches(train[found], held[first[place[found]]])


def find_overlap(
    spool: Spool, side: Sides, share: float, context: Context, with_system: npt.NDArray[np.bool_] | None = None
) -> PartialMatches:
    """Training rows whose prompt overlaps with a held-out or test row's by more than `share`; that row; the share.

    What many of all these prompts have in common counts for none of them. with_system: rows, bool (n,), of which the
    system message is part of what they ask.
    """
    held = np.flatnonzero((side == HELDOUT) | (side == TEST))
    if not len(held):
        return PartialMatches(held, held, np.zeros(0))
    systems = np.zeros(len(side), dtype=bool) if with_system is None else with_system

    def asked(texts: Iterable[bytes | str], rows: Integers) -> list[str]:
        both = systems[rows].tolist()
        return [prompt_text(orjson.loads(text), system) for text, system in zip(texts, both, strict=True)]

    prompts = asked(spool.conversations(held), held)
    index = HeldoutIndex(prompts, share)

    def training() -> Iterator[tuple[int, Integers]]:
        return ((part, np.flatnonzero(side[spool.slice(part)] == TRAIN)) for part in spool.parts())

    def read(part: int, rows: Integers) -> list[str]:
        texts = spool.read(part).column("conversation").take(rows).to_pylist()
        return asked(texts, rows + int(spool.starts[part]))

    workers = parallel.worker_count(len(side), OVERLAP_ENOUGH, context.threads)
    index.shared.add(index.shared.look(list(dict.fromkeys(prompts))))
    for seen in parallel.map_batches(lambda: lambda part: index.shared.look(read(*part)), training(), workers):
        index.shared.add(seen)
    index.leave_out_shared()

    def make() -> Callable[[tuple[int, Integers]], list[tuple[int, int, float]]]:
        def overlaps(part_and_rows: tuple[int, Integers]) -> list[tuple[int, int, float]]:
            part, rows = part_and_rows
            found = index.overlaps(read(part, rows))
            return [(int(row), *match) for row, match in zip(rows, found, strict=True) if match]

        return overlaps

    rows: list[int] = []
    matches: list[int] = []
    shares: list[float] = []
    for part, found in enumerate(parallel.map_batches(make, training(), workers)):
        start = int(spool.starts[part])
        for row, match, value in found:
            rows.append(start + row)
            matches.append(int(held[match]))
            shares.append(value)
        done = int(spool.starts[part + 1])
        context.progress.line(f"{done:,} of {len(side):,} rows compared with the held-out ones")
    return PartialMatches(np.array(rows, np.int64), np.array(matches, np.int64), np.array(shares, np.float64))


def find_near_duplicates(signatures: Signatures, rows: Integers, similarity: float) -> PartialMatches:
    """Those of `rows` that nearly repeat an earlier one that is kept, that one, and their estimated similarity.

    `signatures`: uint8 (all rows, permutations), which is overwritten: those of `rows` move to its start, so that they
    are in memory once.
    """
    for start in range(0, len(rows), CHUNK):
        chosen = rows[start : start + CHUNK]  # none of them stands before its new place
        signatures[start : start + len(chosen)] = signatures[chosen]
    signatures = signatures[: len(rows)]
    matches = near_duplicates(signatures, similarity)
    found = np.flatnonzero(matches >= 0)
    alike = (estimated_similarity(signatures[row], signatures[matches[row]]) for row in found)
    return PartialMatches(rows[found], rows[matches[found]], np.fromiter(alike, np.float64, len(found)))
