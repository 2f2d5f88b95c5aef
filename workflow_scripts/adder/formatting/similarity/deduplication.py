"""Which accepted rows are worth nothing or would spoil the evaluation: duplicates, near-duplicates, leaked prompts.

Rows are numbered in the order of the data. Each finding is arrays of one length, the rows found and the row that each
of them matches, in ascending order of the first.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import orjson

from adder.core import parallel, row_blocks
from adder.core.files import read_bytes
from adder.core.kept_blocks import PAYLOAD
from adder.core.stage_spec import Context, Earlier
from adder.formatting.block_converter import HELDOUT, TEST, TRAIN, prompt_text
from adder.formatting.replies import reply_text
from adder.formatting.similarity.heldout_overlap import HeldoutIndex
from adder.formatting.similarity.heldout_twins import (
    FEW,
    MANY,
    PARTLY,
    Candidate,
    are_twins,
    same_reply_pairs,
    similar_pairs,
)
from adder.formatting.similarity.minhash import Signatures, estimated_similarity, near_duplicates
from adder.formatting.similarity.shared_words import Seen
from adder.formatting.spool import Spool, unpack

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Sides = npt.NDArray[np.int8]  # one of TRAIN, HELDOUT, TEST and UNDECIDED a row
CHUNK = 1 << 16  # rows
PAIRS = 20_000  # of rows, whose texts are compared at once
OVERLAP_ENOUGH = 20_000  # rows that are worth a worker
LOOKED = "overlap.json"


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


class Overlap(NamedTuple):
    """Training rows whose prompt overlaps with a held-out or test row's, and others that are nearly such a row."""

    prompts: PartialMatches
    twins: PartialMatches


def find_overlap(
    spool: Spool,
    side: Sides,
    share: float,
    context: Context,
    with_system: npt.NDArray[np.bool_] | None,
    reply: Hashes,
    signed: tuple[Signatures, float] | None,
) -> Overlap:
    """Training rows whose prompt overlaps with a held-out or test row's by more than `share`, that row, the share; and
    training rows that are nearly a held-out row, prompt and reply.

    What many of all these prompts have in common counts for none of them. with_system: rows, bool (n,), of which the
    system message is part of what they ask. reply: keys of the replies, (n,). signed: signatures of whole rows, uint8
    (n, permutations), and the similarity from which two are alike; None where rows are not signed.
    """
    held = np.flatnonzero((side == HELDOUT) | (side == TEST))
    if not len(held):
        return Overlap(_matches([]), _matches([]))
    systems = np.zeros(len(side), dtype=bool) if with_system is None else with_system
    prompts = _asked(spool.conversations(held), systems[held])
    index = HeldoutIndex(prompts, share)
    parts = [_TrainingPart.of(spool, part, side, systems) for part in spool.parts()]

    def read(part: int, rows: Integers) -> list[str]:
        texts = spool.read(part).column("conversation").take(rows).to_pylist()
        return _asked(texts, systems[rows + int(spool.starts[part])])

    # Few rows have a sequence of a held-out prompt at all; only these are compared once it is known what all share.
    looked = _look(parts, prompts, index, spool, read, context)
    touched = [(part, np.array(rows, np.int64)) for part, rows in enumerate(looked) if rows]
    index.leave_out_shared()

    def make() -> Callable[[tuple[int, Integers]], list[tuple[int, int, float]]]:
        def overlaps(part_and_rows: tuple[int, Integers]) -> list[tuple[int, int, float]]:
            part, rows = part_and_rows
            found = index.overlaps(read(part, rows), min(PARTLY, share))
            return [(int(row), *match) for row, match in zip(rows, found, strict=True) if match]

        return overlaps

    overlapping: list[tuple[int, int, float]] = []
    partly: list[tuple[int, int]] = []
    workers = parallel.worker_count(sum(len(rows) for _, rows in touched), OVERLAP_ENOUGH, context.threads)
    for (part, _), found in zip(touched, parallel.map_batches(make, touched, workers), strict=True):
        start = int(spool.starts[part])
        overlapping += [(start + row, int(held[match]), value) for row, match, value in found if value > share]
        partly += [(start + row, int(held[match])) for row, match, value in found if value <= share]
    known = np.isin(np.arange(len(side)), [row for row, _, _ in overlapping])
    train = np.flatnonzero((side == TRAIN) & ~known)
    alike = similar_pairs(signed[0], train, held, signed[1]) if signed else []
    common, rare = (
        {(int(train[one]), int(held[other])) for one, other in same_reply_pairs(reply[train], reply[held], most)}
        for most in (MANY, FEW)
    )
    candidates: dict[tuple[int, int], Candidate] = {}
    by: list[tuple[Candidate, Iterable[tuple[int, int]]]]
    by = [("common reply", common), ("partly", partly), ("alike", alike), ("rare reply", rare)]
    for how, pairs in by:  # the last one counts: it asks least of the rest
        candidates |= dict.fromkeys(pairs, how)
    return Overlap(_matches(overlapping), _twins(candidates, held, prompts, index, spool, systems))


def _twins(
    candidates: dict[tuple[int, int], Candidate],
    held: Integers,
    prompts: list[str],
    index: HeldoutIndex,
    spool: Spool,
    systems: npt.NDArray[np.bool_],
) -> PartialMatches:
    """Those of the pairs (training row, held-out row) that are nearly one row; of each training row the nearest."""
    place = {row: number for number, row in enumerate(held.tolist())}
    twins: dict[int, tuple[int, float]] = {}
    pairs = sorted(candidates)
    for start in range(0, len(pairs), PAIRS):
        chosen = pairs[start : start + PAIRS]
        rows = np.unique(np.array(chosen, np.int64))
        texts = spool.conversations(rows)
        replies = dict(zip(rows.tolist(), (reply_text(orjson.loads(text)) for text in texts), strict=True))
        asked = dict(zip(rows.tolist(), _asked(texts, systems[rows]), strict=True))
        for row, match in chosen:
            number = place[match]
            one, other = (asked[row], replies[row]), (prompts[number], replies[match])
            agreed = are_twins(one, other, index.own_words(number), candidates[row, match])
            if agreed is not None and (row not in twins or agreed > twins[row][1]):
                twins[row] = (match, agreed)
    return _matches([(row, *twin) for row, twin in sorted(twins.items())])


def _matches(found: Sequence[tuple[int, int, float]]) -> PartialMatches:
    rows, matches, shares = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return PartialMatches(np.array(rows, np.int64), np.array(matches, np.int64), np.array(shares, np.float64))


@dataclass(frozen=True)
class _TrainingPart:
    """The training rows of a part of the spool, counted from its first row.

    name: equal for parts of equal rows of which the same are training rows and have their system message counted; ""
    where that isn't known. place: where the part stands in the spool. rows, systems: int64 and bool, (training rows,).
    """

    name: str
    place: tuple[int, int]
    rows: Integers
    systems: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, spool: Spool, part: int, side: Sides, systems: npt.NDArray[np.bool_]) -> "_TrainingPart":
        own = spool.slice(part)
        rows = np.flatnonzero(side[own] == TRAIN)
        counted = systems[own][rows]
        key = spool.keys[part]
        name = row_blocks.meaning(key, _to_ranges(rows), _to_ranges(rows[counted])) if key else ""
        return cls(name, spool.places[part], rows, counted)


class _LookedPart(TypedDict):
    """A part that was looked at: its name, its place in the spool, training rows and those of them whose system message
    counts, as ranges, and which of them have a sequence of a held-out prompt.
    """

    name: str
    place: tuple[int, int]
    rows: list[int]
    systems: list[int]
    touched: list[int]


class _Looked(TypedDict):
    """overlap.json: what was found in the training rows for the held-out prompts that `made_by` stands for.

    counts: SharedWords.counts, as base64 of int64.
    """

    made_by: str
    counts: list[str]
    parts: list[_LookedPart]


def _look(
    parts: list[_TrainingPart],
    prompts: list[str],
    index: HeldoutIndex,
    spool: Spool,
    read: Callable[[int, Integers], list[str]],
    context: Context,
) -> list[list[int]]:
    """Count in the training rows the sequences of the held-out prompts; of each part, the rows that have one.

    Where an earlier run counted for the same held-out prompts, only what was added since is counted, and what is gone.
    """
    made_by = ""
    found: list[list[int] | None] = [None] * len(parts)
    if context.earlier and spool.kept:
        libraries = row_blocks.versions("numpy")
        made_by = row_blocks.meaning(context.earlier.code(__name__), libraries, prompts, index.share)
        found = _take_earlier(parts, index, made_by, context.earlier)
    if all(one is None for one in found):
        index.shared.add(index.shared.look(list(dict.fromkeys(prompts))))
    new = [(number, parts[number].rows) for number, one in enumerate(found) if one is None]
    workers = parallel.worker_count(sum(len(rows) for _, rows in new), OVERLAP_ENOUGH, context.threads)

    def look(part_and_rows: tuple[int, Integers]) -> tuple[Seen, Integers]:
        seen, touched = index.look(read(*part_and_rows))
        return seen, part_and_rows[1][touched]

    for (part, _), (seen, touched) in zip(new, parallel.map_batches(lambda: look, new, workers), strict=True):
        index.shared.add(seen)
        found[part] = touched.tolist()
        context.progress.line(f"{int(spool.starts[part + 1]):,} of {int(spool.starts[-1]):,} rows compared")
    looked = [one or [] for one in found]
    if made_by:
        written: _Looked = {
            "made_by": made_by,
            "counts": [base64.b64encode(counts.tobytes()).decode() for counts in index.shared.counts],
            "parts": [_as_json(part, touched) for part, touched in zip(parts, looked, strict=True)],
        }
        (spool.path.parent / LOOKED).write_bytes(orjson.dumps(written))
    return looked


def _take_earlier(
    parts: list[_TrainingPart], index: HeldoutIndex, made_by: str, earlier: Earlier
) -> list[list[int] | None]:
    """Set `index`'s counts to those of an earlier run, less what it saw of parts that are gone; of each part the rows
    that it found, None where the part is new. All are new where no earlier run helps.
    """
    nothing: list[list[int] | None] = [None] * len(parts)
    for folder in earlier.folders:
        try:
            looked: _Looked = orjson.loads((folder / LOOKED).read_bytes())
            file = (folder / PAYLOAD).open("rb")
        except OSError:
            continue
        with file:
            if looked["made_by"] != made_by:
                continue
            known: dict[str, list[_LookedPart]] = {}
            for one in looked["parts"]:
                known.setdefault(one["name"], []).append(one)
            taken = [known[part.name].pop() if known.get(part.name) else None for part in parts]
            gone = [one for rest in known.values() for one in rest]
            if len(gone) + taken.count(None) >= len(parts):  # to count all anew is no more work
                continue
            index.shared.counts = [np.frombuffer(base64.b64decode(one), np.int64).copy() for one in looked["counts"]]
            for one in gone:
                rows = _from_ranges(one["rows"])
                texts = unpack(read_bytes(file.fileno(), *one["place"])).column("conversation").take(rows).to_pylist()
                index.shared.add(index.look(_asked(texts, np.isin(rows, _from_ranges(one["systems"]))))[0], -1)
            return [one["touched"] if one else None for one in taken]
    return nothing


def _as_json(part: _TrainingPart, touched: list[int]) -> _LookedPart:
    systems = part.rows[part.systems]
    return {
        "name": part.name, "place": part.place, "rows": _to_ranges(part.rows), "systems": _to_ranges(systems),
        "touched": touched,
    }  # fmt: skip


def _to_ranges(numbers: Integers) -> list[int]:
    """Ascending numbers as where each unbroken range of them begins, and ends (exclusive)."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [int(end) for part in np.split(numbers, breaks) if len(part) for end in (part[0], part[-1] + 1)]


def _from_ranges(ranges: list[int]) -> Integers:
    parts = [np.arange(a, b) for a, b in zip(ranges[::2], ranges[1::2], strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _asked(texts: Iterable[bytes | str], with_system: npt.NDArray[np.bool_]) -> list[str]:
    """What conversations (JSON) ask. with_system: of which the system message is part of that, bool (n,)."""
    return [prompt_text(orjson.loads(text), system) for text, system in zip(texts, with_system.tolist(), strict=True)]


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
