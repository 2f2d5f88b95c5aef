"""Best-fit-decreasing packing of examples into sequences of one length, and what padding costs without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SEED = 42  # of the shuffled order of packs, and of the batches that packs are compared with

Lengths = Sequence[int] | npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packs:
    """Which examples stand in which pack: those of pack p are `order[borders[p]:borders[p + 1]]` (both int64)."""

    order: Integers
    borders: Integers

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, pack: int) -> Integers:
        return self.order[self.borders[pack] : self.borders[pack + 1]]

    def take(self, packs: Integers) -> "Packs":
        """The same packs in another order."""
        sizes = np.diff(self.borders)[packs]
        borders = np.concatenate([[0], np.cumsum(sizes)])
        positions = np.repeat(self.borders[packs] - borders[:-1], sizes) + np.arange(borders[-1])
        return Packs(self.order[positions], borders)


def one_by_one(count: int) -> Packs:
    """`count` examples, each a pack of its own."""
    return Packs(np.arange(count), np.arange(count + 1))


def best_fit_decreasing(lengths: Lengths, capacity: int) -> Packs:
    """Pack examples into as few sequences of at most `capacity` tokens as best-fit decreasing finds.

    Longest example first, each goes into the fullest pack that still has room for it (Johnson 1973: at most 11/9 of the
    optimal number of packs, plus 6/9). Packs with equal room are interchangeable, so they are kept together by room,
    and examples of equal length are placed together: a pack that takes one of them has now less room than every other
    pack that fits, hence takes the next too, until none fits; then the next pack of that room. So a step places many
    examples, and there are no more than distinct lengths × distinct rooms steps, however many examples there are.

    Packs come in the order in which they were opened, the longest example of a pack first. Deterministic.
    Raises ValueError for a length below 1 or above `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return Packs(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be 1..{capacity}, found {lengths.min()}..{lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    pack_of = np.empty(len(lengths), dtype=np.int64)  # of the examples in the order of `order`
    by_room: dict[int, Integers] = {}  # room left -> packs with exactly that room
    rooms = 0  # the same keys as a bit set: bit r is set when by_room[r] has packs
    opened = done = 0

    def keep(packs: Integers, room: int) -> None:
        nonlocal rooms
        if len(packs):
            by_room[room] = np.concatenate([by_room[room], packs]) if room in by_room else packs
            rooms |= 1 << room

    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                packs = by_room.pop(room)
                rooms ^= 1 << room
            else:
                room = capacity
                fresh = -(-(end - done) // (capacity // length))
                packs = np.arange(opened, opened + fresh)
                opened += fresh
            each = room // length
            used = min(len(packs), -(-(end - done) // each))
            placed = min(end - done, used * each)
            pack_of[done : done + placed] = np.repeat(packs[:used], each)[:placed]
            done += placed
            partly = placed - (used - 1) * each  # examples in the last of them
            keep(packs[: used - 1], room - each * length)
            keep(packs[used - 1 : used], room - partly * length)
            keep(packs[used:], room)
    by_pack = np.argsort(pack_of, kind="stable")
    return Packs(order[by_pack], np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=opened))]))


def waste(tokens: int, positions: int) -> float:
    """Share of `positions` that hold no token, 0 to 1."""
    return 1.0 - tokens / positions if positions else 0.0


def batch_padded_positions(lengths: Lengths, batch_size: int, seed: int = SEED) -> int:
    """Positions that examples take in shuffled batches, each batch padded to its longest example: one epoch's worth."""
    shuffled = np.random.default_rng(seed).permutation(np.asarray(lengths, dtype=np.int64))
    if not len(shuffled):
        return 0
    starts = np.arange(0, len(shuffled), batch_size)
    longest = np.maximum.reduceat(shuffled, starts)
    rows = np.diff(np.append(starts, len(shuffled)))
    return int((longest * rows).sum())
