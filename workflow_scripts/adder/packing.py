"""Best-fit-decreasing packing of examples into sequences of one length, and what padding costs without it."""

from collections.abc import Sequence

import numpy as np

Lengths = Sequence[int] | np.ndarray


def best_fit_decreasing(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Pack examples into as few sequences of at most `capacity` tokens as best-fit decreasing finds.

    Longest example first, each goes into the fullest pack that still has room for it (Johnson 1973: at most 11/9 of the
    optimal number of packs, plus 6/9). Packs with equal room are interchangeable, so they are kept in buckets by room,
    and examples of equal length are placed together: a pack that takes one of them has now less room than every other
    pack that fits, hence takes the next too, until none fits. That makes it O(n + distinct lengths * capacity / 64).

    Returns the indices of `lengths` in each pack, the longest example of a pack first. Deterministic.
    Raises ValueError for a length below 1 or above `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be 1..{capacity}, found {lengths.min()}..{lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    indices = order.tolist()
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> packs with exactly that room
    rooms = 0  # the same keys as a bit set: bit r is set when by_room[r] has packs
    done = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                bucket = by_room[room]
                pack = bucket.pop()
                if not bucket:
                    rooms ^= 1 << room
            else:
                room, pack = capacity, len(packs)
                packs.append([])
            fits = min(room // length, end - done)
            packs[pack].extend(indices[done : done + fits])
            done += fits
            room -= fits * length
            by_room.setdefault(room, []).append(pack)
            rooms |= 1 << room
    return packs


def waste(tokens: int, positions: int) -> float:
    """Share of `positions` that hold no token, 0 to 1."""
    return 1.0 - tokens / positions if positions else 0.0


def packed_positions(packs: Sequence[Sequence[int]], capacity: int) -> int:
    """Positions that packs take when each is filled up to `capacity`."""
    return len(packs) * capacity


def padded_positions(lengths: Lengths, max_seq_length: int) -> int:
    """Positions that examples take when each is padded to `max_seq_length`."""
    return len(lengths) * max_seq_length


def batch_padded_positions(lengths: Lengths, batch_size: int, seed: int = 42) -> int:
    """Positions that examples take in shuffled batches, each batch padded to its longest example: one epoch's worth."""
    shuffled = np.random.default_rng(seed).permutation(np.asarray(lengths, dtype=np.int64))
    if not len(shuffled):
        return 0
    starts = np.arange(0, len(shuffled), batch_size)
    longest = np.maximum.reduceat(shuffled, starts)
    rows = np.diff(np.append(starts, len(shuffled)))
    return int((longest * rows).sum())
