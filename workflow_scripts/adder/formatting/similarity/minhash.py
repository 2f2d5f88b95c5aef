"""Near-duplicates of one another among rows: MinHash signatures, and the pairs that they tell."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from adder.formatting.similarity import words
from adder.formatting.similarity.words import PLACES, folded, hash_sequences, hash_words

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint8]  # (rows, PERMUTATIONS)
Shares = npt.NDArray[np.float64]

SHINGLE = 3  # words
PERMUTATIONS = 128  # of MinHash: the standard error of a similarity s is sqrt(s * (1 - s) / 128), 0.035 at 0.8
SEED = 1
CHUNK = 1 << 16  # rows
SORTERS = 2  # threads
RECALL = 0.9  # of the pairs exactly at the asked similarity; of more similar ones nearly all
# Kept rows that one row is compared with in a bucket: bounds the work where thousands share a boilerplate text.
MOST_COMPARED = 32


def near_duplicate_method(similarity: float) -> str:
    """How near-duplicates are found, as a sentence for people."""
    bands, rows = band_shape(similarity)
    return (
        f"Two conversations are near-duplicates where at least {100 * similarity:g} % of their {SHINGLE}-word "
        f"sequences are shared (Jaccard), estimated by MinHash with {PERMUTATIONS} permutations in {bands} bands of "
        f"{rows} (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3)."
    )


class Signer:
    """MinHash signatures of texts (Broder 1997, "On the resemblance and containment of documents")."""

    def __init__(self) -> None:
        self._matrix = _minhash()
        words.kinds()  # made here, once, for all workers

    def sign(self, texts: Sequence[str]) -> Signatures:
        """Signatures of the texts' sets of 3-word sequences, uint8 (len(texts), PERMUTATIONS).

        The lowest byte of each minimum is enough: equal minima stay equal, and different ones become equal by a chance
        of 1 in 256, which `estimated_similarity` takes into account (Li and König 2010, "b-bit minwise hashing"). A
        text of one or two words is the set of that one sequence, and a text of none the set of itself.
        """
        if not len(texts):
            return np.empty((0, PERMUTATIONS), np.uint8)
        shingles, offsets = _shingles(texts)
        rows = self._matrix(shingles, offsets.astype(np.uint64), PERMUTATIONS, SEED).to_rows()
        flat = np.fromiter(chain.from_iterable(rows), np.uint32, len(rows) * PERMUTATIONS)
        return flat.astype(np.uint8).reshape(len(rows), PERMUTATIONS)


def near_duplicates(signatures: Signatures, similarity: float) -> Integers:
    """For each row the index of the earlier kept row that it nearly repeats, or -1 where it is kept; int64 (n,).

    `signatures`: uint8 (n, PERMUTATIONS) in the order of the rows. A row is dropped only for an *estimated* similarity
    of at least `similarity` with a row that is kept itself (the most similar one, the earliest of equals): no chain of
    small differences joins rows that differ much. Candidates are found by banding, so that rows that have little in
    common are never compared. Needs about 90 bytes a row at 0.8 beside the signatures.
    """
    matches = np.full(len(signatures), -1, np.int64)
    buckets, count = _buckets(signatures, *band_shape(similarity))
    first = np.full(count, -1, np.int32)  # kept row of each bucket; most have no other
    others: dict[int, list[int]] = {}
    for row in np.flatnonzero((buckets >= 0).any(axis=0)).tolist():
        shared = buckets[:, row]
        shared = shared[shared >= 0]
        kept = first[shared].tolist()
        shared = shared.tolist()
        found = {one for one in kept if one >= 0}
        if others:
            found.update(chain.from_iterable(others.get(bucket, ()) for bucket in shared))
        if found:
            candidates = sorted(found)
            alike = _similarity((signatures[candidates] == signatures[row]).mean(axis=1))
            best = int(alike.argmax())
            if alike[best] >= similarity:
                matches[row] = candidates[best]
                continue
        for bucket, one in zip(shared, kept, strict=True):
            if one < 0:
                first[bucket] = row
            elif len(others.setdefault(bucket, [])) < MOST_COMPARED - 1:
                others[bucket].append(row)
    return matches


def estimated_similarity(one: Signatures, other: Signatures) -> float:
    """Jaccard similarity of two texts' 3-word sequences as their signatures, uint8 (PERMUTATIONS,), tell it: 0 to 1."""
    return float(_similarity(np.array([np.mean(one == other)]))[0])


def exact_similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' sets of 3-word sequences."""
    shingles, offsets = _shingles([one, other])
    left, right = set(shingles[: offsets[1]].tolist()), set(shingles[offsets[1] :].tolist())
    return len(left & right) / len(left | right)


@cache
def band_shape(similarity: float) -> tuple[int, int]:
    """How many bands of how many rows: the fewest chance candidates that leave RECALL of the pairs at `similarity`.

    A pair of similarity s shares at least one of b bands of r rows with probability 1 - (1 - s**r)**b (Leskovec,
    Rajaraman, Ullman: Mining of Massive Datasets, section 3.4). Candidates are verified, so a chance one costs time
    only, but a missed pair is lost: hence a wanted recall instead of equal weights for both errors.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


def _shingles(texts: Sequence[str]) -> tuple[Hashes, Integers]:
    """Hashes of each text's 3-word sequences, at least one a text, and where each text's begin and end."""
    hashed, offsets = hash_words(texts)
    counts = np.diff(offsets)
    hashes, _ = hash_sequences(hashed, offsets, SHINGLE)
    shingled = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.maximum(np.maximum(counts - SHINGLE + 1, 0), counts < SHINGLE), out=shingled[1:])
    found = np.empty(shingled[-1], np.uint64)
    short = np.flatnonzero(counts < SHINGLE)
    of_short = np.zeros(len(found), bool)
    of_short[shingled[short]] = True
    found[~of_short] = hashes
    found[shingled[short]] = [_hash_short(texts[n], hashed[offsets[n] : offsets[n + 1]]) for n in short.tolist()]
    return found, shingled


def _hash_short(text: str, hashed: Hashes) -> int:
    data = hashed.tobytes() or " ".join(folded(text).split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _similarity(agreement: Shares) -> Shares:
    """The share of equal signature bytes, less what agrees by chance."""
    return np.maximum((agreement - 1 / 256) / (1 - 1 / 256), 0.0)


def _buckets(signatures: Signatures, bands: int, rows: int) -> tuple[npt.NDArray[np.int32], int]:
    """For each band and row the number of its bucket, or -1 where it is alone there, int32 (bands, n); how many."""
    buckets = np.full((bands, len(signatures)), -1, np.int32)
    count = 0
    if len(signatures) < 2:
        return buckets, count
    with ThreadPoolExecutor(SORTERS) as threads:  # numpy sorts without holding Python's lock
        found = threads.map(lambda band: _shared_keys(signatures[:, band * rows : (band + 1) * rows]), range(bands))
        for band, (shared, numbers) in enumerate(found):
            buckets[band, shared] = numbers + count
            count += int(numbers[-1]) + 1 if len(numbers) else 0
    return buckets, count


def band_keys(signatures: Signatures) -> Hashes:
    """One number for each row's bytes of a band, uint8 (n, places): equal where the bytes are; uint64 (n,)."""
    keys = np.empty(len(signatures), np.uint64)
    for start in range(0, len(signatures), CHUNK):  # each row's bytes of a band are read at once
        part = signatures[start : start + CHUNK]
        keys[start : start + CHUNK] = part.astype(np.uint64) @ PLACES[: part.shape[1]]
    return keys


def _shared_keys(signatures: Signatures) -> tuple[Integers, npt.NDArray[np.int32]]:
    """The rows whose bytes others have too, uint8 (n, places) in all, and from 0 on the number of what they share."""
    keys = band_keys(signatures)
    order = np.argsort(keys)
    keys = keys[order]
    new = np.concatenate([[True], keys[1:] != keys[:-1]])
    shared = ~new
    shared[:-1] |= shared[1:]
    return order[shared], np.cumsum(new[shared], dtype=np.int32) - 1


@cache
def _minhash() -> Callable[..., Any]:
    """rensa's function from hashes and offsets to signatures, in one thread.

    It would start threads of its own at the first large batch, and a process forked after that would wait for them for
    ever. How many is read from the environment once, then; the tokenizer's own threads read it at another time.
    """
    import rensa

    sign = cast("Any", rensa).RMinHash.digest_matrix_from_flat_token_hashes  # compiled, without types
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        many = np.arange(4096, dtype=np.uint64)
        sign(many[:-1], many, 1, SEED)
    finally:
        if before is None:
            del os.environ["RAYON_NUM_THREADS"]
        else:
            os.environ["RAYON_NUM_THREADS"] = before
    return sign
