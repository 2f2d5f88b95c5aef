"""Which accepted rows are worth nothing or would spoil the evaluation: duplicates, near-duplicates, leaked prompts.

Rows are numbered in the order of the data. Each finding is a pair of arrays, the rows found and the row that each of
them matches, in ascending order of the first.
"""

from collections.abc import Callable

import numpy as np
import orjson

from adder.core import hardware, parallel
from adder.core.progress import Progress
from adder.formatting.block_converter import HELDOUT, TEST, TRAIN, prompt_text
from adder.formatting.minhash import HeldoutIndex, estimated_similarity, near_duplicates
from adder.formatting.spool import Spool

Pairs = tuple[np.ndarray, np.ndarray]
CHUNK = 1 << 16  # rows
OVERLAP_ENOUGH = 20_000  # rows that are worth a worker


def find_duplicates(side: np.ndarray, digest: np.ndarray) -> Pairs:
    """Rows whose digest an earlier row of the same side has, and the first such row. Test rows are left alone."""
    rows = np.flatnonzero(side != TEST)
    rows = rows[np.lexsort((side[rows], digest[rows]))]  # stable: equal ones stay in order
    if not len(rows):
        return rows, rows
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (digest[rows[1:]] != digest[rows[:-1]]) | (side[rows[1:]] != side[rows[:-1]])
    first = rows[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
    return _ordered(rows[~new], first[~new])


def find_leaks(side: np.ndarray, prompt: np.ndarray) -> Pairs:
    """Training rows that ask what a held-out or test row asks, and the first such row."""
    held = np.flatnonzero((side == HELDOUT) | (side == TEST))
    train = np.flatnonzero(side == TRAIN)
    if not len(held):
        return train[:0], train[:0]
    prompts, first = np.unique(prompt[held], return_index=True)
    place = np.minimum(np.searchsorted(prompts, prompt[train]), len(prompts) - 1)
    found = prompts[place] == prompt[train]
    return train[found], held[first[place[found]]]


def find_overlap(
    spool: Spool, side: np.ndarray, share: float, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows whose prompt overlaps with a held-out or test row's by more than `share`; that row; the share."""
    held = np.flatnonzero((side == HELDOUT) | (side == TEST))
    if not len(held):
        return held, held, np.zeros(0)
    index = HeldoutIndex([prompt_text(orjson.loads(text)) for text in spool.conversations(held)], share)

    def make() -> Callable[[tuple[int, np.ndarray]], list[tuple[int, int, float]]]:
        def overlaps(part_and_rows: tuple[int, np.ndarray]) -> list[tuple[int, int, float]]:
            part, rows = part_and_rows
            texts = spool.read(part).column("conversation").take(rows).to_pylist()
            found = index.overlaps([prompt_text(orjson.loads(text)) for text in texts])
            return [(int(row), *match) for row, match in zip(rows, found, strict=True) if match]

        return overlaps

    training = ((part, np.flatnonzero(side[spool.slice(part)] == TRAIN)) for part in spool.parts())
    workers = parallel.worker_count(len(side), OVERLAP_ENOUGH, hardware.threads())
    rows, matches, shares, done = [], [], [], 0
    for part, found in enumerate(parallel.map_batches(make, training, workers)):
        start = int(spool.starts[part])
        for row, match, value in found:
            rows.append(start + row)
            matches.append(held[match])
            shares.append(value)
        done = int(spool.starts[part + 1])
        progress.line(f"{done:,} of {len(side):,} rows compared with the held-out ones")
    return np.array(rows, dtype=np.int64), np.array(matches, dtype=np.int64), np.array(shares)


def find_near_duplicates(
    signatures: np.ndarray, rows: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    return rows[found], rows[matches[found]], np.fromiter(alike, np.float64, len(found))


def _ordered(rows: np.ndarray, matches: np.ndarray) -> Pairs:
    order = np.argsort(rows)
    return rows[order], matches[order]
