"""What makes rows poor training data: near-duplicates of one another, and overlap with the rows that judge the model.

Both compare sequences of words. A word is a run of letters, digits and marks without case; in scripts that write no
spaces (Han, kana, Thai, ...) each character is one. Words are hashed for a whole batch of texts at once with numpy: a
Python object a word would cost more than all the rest. Two different sequences have the same 64-bit hash with a chance
of about 1e-5 in a comparison of five million prompts with twenty thousand, so equal hashes count as equal words.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain

import numpy as np

SHINGLE = 3  # words
PERMUTATIONS = 128  # of MinHash: the standard error of a similarity s is sqrt(s * (1 - s) / 128), 0.035 at 0.8
SEED = 1
RECALL = 0.9  # of the pairs exactly at the asked similarity; of more similar ones nearly all
# Kept rows that one row is compared with in a bucket: bounds the work where thousands share a boilerplate text.
MOST_COMPARED = 32
NGRAM = 8  # words
SHORTEST = 4  # words of a held-out prompt, below which only equality counts
# Sequences in more held-out prompts than this are boilerplate. Ten is also where NVIDIA's NeMo Curator begins to call
# one too common (TaskDecontamination, max_matches).
COMMON = 10

BLOCK = 1_000_000  # characters hashed at once: about 50 MB of numpy arrays
# Scripts written without spaces: Thai and Lao, Tibetan, Burmese, Khmer, kana, Han with its extensions.
UNSPACED = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
BETWEEN, LETTER, ALONE = 0, 1, 2  # a character's kind: between words, part of one, or a word by itself
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
# One odd multiplier a place of a sequence, so that order counts.
PLACES = np.random.default_rng(SEED).integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def near_duplicate_method(similarity: float) -> str:
    """How near-duplicates are found, as a sentence for people."""
    bands, rows = band_shape(similarity)
    return (
        f"Two conversations are near-duplicates where at least {100 * similarity:g} % of their {SHINGLE}-word "
        f"sequences are shared (Jaccard), estimated by MinHash with {PERMUTATIONS} permutations in {bands} bands of "
        f"{rows} (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3)."
    )


def overlap_method(share: float) -> str:
    """How overlap with held-out and test prompts is found, as a sentence for people."""
    return (
        f"A training prompt overlaps with a held-out or test prompt where more than {100 * share:g} % of that prompt's "
        f"words lie in {NGRAM}-word sequences that both have, or where a whole prompt of {SHORTEST} to {NGRAM - 1} "
        f"words makes up more than {100 * share:g} % of it (Lambert et al. 2024, Tülu 3, arXiv:2411.15124, section "
        f"3.2); sequences in more than {COMMON} such prompts are boilerplate and don't count."
    )


# Words


def prompt_words(text: str) -> list[str]:
    """The words of a text, casefolded, as all of this module sees them."""
    folded = text.casefold()
    starts, ends, _ = _spans(_codes(folded))
    return [folded[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def hash_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all words of all texts, uint64 (words,), and where each text's begin and end, int64 (texts + 1,)."""
    hashes, counts = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)]
    for block in _blocks(texts):
        folded = [text.casefold() for text in block]
        ends = np.cumsum([len(text) + 1 for text in folded])
        codes = _codes("\n".join(folded))
        starts, _, inside = _spans(codes)
        hashes.append(_hash_spans(codes, starts, inside))
        counts.append(np.diff(np.searchsorted(starts, ends), prepend=0))
    return np.concatenate(hashes), np.cumsum(np.concatenate(counts))


def hash_sequences(words: np.ndarray, offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all sequences of `length` words inside one text, uint64 (n,), and the word each begins at, int64 (n,).

    `words`, `offsets`: as `hash_words` returns them.
    """
    room = np.maximum(np.diff(offsets) - length + 1, 0)
    first = np.repeat(offsets[:-1] - (np.cumsum(room) - room), room) + np.arange(room.sum())
    if not len(first):
        return np.empty(0, np.uint64), first
    hashes = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        hashes += words[place : place + len(hashes)] * PLACES[place]
    return hashes[first], first


@cache
def _kinds() -> np.ndarray:
    """The kind of every character, uint8 (0x110000,)."""
    kinds = np.zeros(0x110000, np.uint8)
    for code in range(0x30000):  # beyond it are only rare Han, filled in below, and signs that are in no word
        character = chr(code)
        if character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M":
            kinds[code] = LETTER
    kinds[0x30000:0x323B0] = LETTER
    for first, last in UNSPACED:
        kinds[first : last + 1] *= ALONE
    return kinds


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _spans(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where words start and end (exclusive), and whether each character is in one."""
    kinds = _kinds()[codes]
    inside = kinds > BETWEEN
    letters = kinds == LETTER
    continued = letters[1:] & letters[:-1]
    starts, ends = inside.copy(), inside.copy()
    starts[1:] &= ~continued
    ends[:-1] &= ~continued
    return np.flatnonzero(starts), np.flatnonzero(ends) + 1, inside


def _hash_spans(codes: np.ndarray, starts: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A word's characters as the digits of a number modulo 2**64, mixed: the same wherever the word stands."""
    if not len(starts):
        return np.empty(0, np.uint64)
    powers, inverses = _powers(1 << (len(codes) - 1).bit_length())
    digits = codes * powers[: len(codes)]
    digits *= inside
    return _mixed(np.add.reduceat(digits, starts) * inverses[starts])


@cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE to the powers 0, 1, ... and to 0, -1, ..., both uint64 (count,), modulo 2**64."""
    inverse = np.uint64(pow(int(BASE), -1, 2**64))
    up, down = np.full(count, BASE), np.full(count, inverse)
    up[0] = down[0] = 1
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The values with every bit spread over all bits: the finaliser of MurmurHash3 (Appleby)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, in blocks of at most BLOCK characters or one text."""
    start = size = 0
    for number, text in enumerate(texts):
        if size + len(text) > BLOCK and number > start:
            yield texts[start:number]
            start, size = number, 0
        size += len(text) + 1
    if start < len(texts):
        yield texts[start:]


# Near-duplicates


class Signer:
    """MinHash signatures of texts (Broder 1997, "On the resemblance and containment of documents")."""

    def __init__(self) -> None:
        self._matrix = _minhash()
        _kinds()

    def sign(self, texts: Sequence[str]) -> np.ndarray:
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


def near_duplicates(signatures: np.ndarray, similarity: float) -> np.ndarray:
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


def estimated_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two texts' 3-word sequences as their signatures, uint8 (PERMUTATIONS,), tell it: 0 to 1."""
    return float(_similarity(np.mean(one == other)))


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


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each text's 3-word sequences, at least one a text, and where each text's begin and end."""
    words, offsets = hash_words(texts)
    counts = np.diff(offsets)
    hashes, _ = hash_sequences(words, offsets, SHINGLE)
    shingled = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.maximum(np.maximum(counts - SHINGLE + 1, 0), counts < SHINGLE), out=shingled[1:])
    found = np.empty(shingled[-1], np.uint64)
    short = np.flatnonzero(counts < SHINGLE)
    of_short = np.zeros(len(found), bool)
    of_short[shingled[short]] = True
    found[~of_short] = hashes
    found[shingled[short]] = [_hash_short(texts[n], words[offsets[n] : offsets[n + 1]]) for n in short.tolist()]
    return found, shingled


def _hash_short(text: str, words: np.ndarray) -> int:
    data = words.tobytes() or " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _similarity(agreement: np.ndarray | float) -> np.ndarray | float:
    """The share of equal signature bytes, less what agrees by chance."""
    return np.maximum((agreement - 1 / 256) / (1 - 1 / 256), 0.0)


def _buckets(signatures: np.ndarray, bands: int, rows: int) -> tuple[np.ndarray, int]:
    """For each band and row the number of its bucket, or -1 where it is alone there, int32 (bands, n); how many."""
    buckets = np.full((bands, len(signatures)), -1, np.int32)
    count = 0
    for band in range(bands if len(signatures) > 1 else 0):
        keys = np.zeros(len(signatures), np.uint64)
        for place in range(rows):
            keys += signatures[:, band * rows + place] * PLACES[place]
        order = np.argsort(keys)
        keys = keys[order]
        new = np.concatenate([[True], keys[1:] != keys[:-1]])
        shared = ~new
        shared[:-1] |= shared[1:]
        numbers = np.cumsum(new[shared], dtype=np.int32) - 1 + count
        buckets[band, order[shared]] = numbers
        count = int(numbers[-1]) + 1 if len(numbers) else count
    return buckets, count


@cache
def _minhash():
    """rensa's function from hashes and offsets to signatures, in one thread.

    It would start threads of its own at the first large batch, and a process forked after that would wait for them for
    ever. How many is read from the environment once, then; the tokenizer's own threads read it at another time.
    """
    import rensa

    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        many = np.arange(4096, dtype=np.uint64)
        rensa.RMinHash.digest_matrix_from_flat_token_hashes(many[:-1], many, 1, SEED)
    finally:
        if before is None:
            del os.environ["RAYON_NUM_THREADS"]
        else:
            os.environ["RAYON_NUM_THREADS"] = before
    return rensa.RMinHash.digest_matrix_from_flat_token_hashes


# Overlap with held-out and test prompts


class HeldoutIndex:
    """Finds training prompts that overlap with a held-out or test prompt.

    The rule is that of Lambert et al. 2024 (Tülu 3, arXiv:2411.15124, section 3.2, there on tokens): a held-out word
    counts if it lies in an 8-word sequence that the same training prompt has too, and the two overlap where more than
    `share` of the held-out prompt's words do. Two additions:
    - A held-out prompt of 4 to 7 words overlaps where all of it stands in the training prompt and makes up more than
      `share` of that: a longer request that begins with a common short one is another request.
    - Sequences that stand in many held-out prompts (more than COMMON, or than half of fewer than 20) are boilerplate,
      such as an instruction before every question: words that lie in no other sequence count for neither side.
    """

    def __init__(self, prompts: Sequence[str], share: float):
        self.share = share
        words, offsets = hash_words(prompts)
        lengths = np.diff(offsets)
        self._of = _distinct(words, offsets)  # equal prompts are one, named by the first
        self._tables = [self._table(words, offsets, length, lengths == length) for length in range(SHORTEST, NGRAM)]
        self._tables.append(self._table(words, offsets, NGRAM, lengths >= NGRAM))
        self._tables = [table for table in self._tables if len(table.hashes)]

    def overlaps(self, texts: Sequence[str]) -> list[tuple[int, float] | None]:
        """For each training prompt the held-out prompt (its index) with the largest share above the limit, and that
        share; the first of equals; None where there is none."""
        words, offsets = hash_words(texts)
        sizes = np.diff(offsets)
        best: list[tuple[int, float] | None] = [None] * len(texts)
        for table in self._tables:
            hashes, first = hash_sequences(words, offsets, table.length)
            found = table.find(hashes)
            hits = np.flatnonzero(found >= 0)
            if not len(hits):
                continue
            text_of = np.searchsorted(offsets, first[hits], side="right") - 1
            for text, prompt, share in table.shares(text_of, found[hits]):
                earlier = best[text]
                if table.length < NGRAM and table.length <= self.share * sizes[text]:
                    continue
                if share > self.share and (earlier is None or (-share, prompt) < (-earlier[1], earlier[0])):
                    best[text] = (prompt, share)
        return best

    def _table(self, words: np.ndarray, offsets: np.ndarray, length: int, members: np.ndarray) -> "_Table":
        members = members & (self._of == np.arange(len(self._of)))
        hashes, first = hash_sequences(words, offsets, length)
        prompt = np.searchsorted(offsets, first, side="right") - 1
        taken = members[prompt]
        prompts = int(members.sum())
        return _Table(hashes[taken], prompt[taken], (first - offsets[prompt])[taken], length, prompts)


class _Table:
    """The held-out sequences of one length, boilerplate left out: sorted distinct hashes, and where each stands."""

    def __init__(self, hashes: np.ndarray, prompt: np.ndarray, place: np.ndarray, length: int, prompts: int):
        self.length = length
        order = np.lexsort((place, prompt, hashes))
        hashes, prompt, place = hashes[order], prompt[order], place[order]
        rare = _prompts_with(hashes, prompt) <= min(COMMON, max(2, prompts // 2))
        self._prompt, self._place = prompt[rare], place[rare]
        self.hashes, self._start, self._count = np.unique(hashes[rare], return_index=True, return_counts=True)
        counted, _, covered = _cover(np.zeros(len(self._prompt), np.int64), self._prompt, self._place, length)
        self._words = dict(zip(counted.tolist(), covered.tolist(), strict=True)) if len(counted) else {}
        # Most sequences of training prompts are in no held-out one: a table of bits answers that in a few nanoseconds.
        bits = max(16, (16 * len(self.hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)
        self._maybe[self.hashes >> self._shift] = True

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The index of each hash among `self.hashes`, or -1; int64."""
        found = np.full(len(hashes), -1, np.int64)
        maybe = np.flatnonzero(self._maybe[hashes >> self._shift])
        place = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        found[maybe] = np.where(self.hashes[place] == hashes[maybe], place, -1)
        return found

    def shares(self, text: np.ndarray, found: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """Each text and held-out prompt with a common sequence, and the share of the prompt's words in such.

        `text`, `found`: one entry a sequence, the text that has it and its index among `self.hashes`.
        """
        count = self._count[found]
        entry = np.repeat(self._start[found] - (np.cumsum(count) - count), count) + np.arange(count.sum())
        prompt, texts, covered = _cover(np.repeat(text, count), self._prompt[entry], self._place[entry], self.length)
        for one, other, words in zip(texts.tolist(), prompt.tolist(), covered.tolist(), strict=True):
            yield one, other, words / self._words[other]


def _distinct(words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """For each text the first text of the same words; int64 (texts,)."""
    first: dict[bytes, int] = {}
    ends = offsets.tolist()
    pairs = enumerate(zip(ends, ends[1:], strict=False))
    return np.array([first.setdefault(words[a:b].tobytes(), number) for number, (a, b) in pairs], dtype=np.int64)


def _prompts_with(hashes: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """For each entry, sorted by hash and prompt, how many different prompts have its hash."""
    if not len(hashes):
        return np.empty(0, np.int64)
    new_hash = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    new_pair = new_hash | np.concatenate([[True], prompt[1:] != prompt[:-1]])
    counts = np.add.reduceat(new_pair.astype(np.int64), np.flatnonzero(new_hash))
    return counts[np.cumsum(new_hash) - 1]


def _cover(text: np.ndarray, prompt: np.ndarray, place: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Each pair of prompt and text, and how many of the prompt's words lie in a sequence that begins at a `place`."""
    order = np.lexsort((place, prompt, text))
    text, prompt, place = text[order], prompt[order], place[order]
    if not len(order):
        return prompt, text, place
    new = np.concatenate([[True], (text[1:] != text[:-1]) | (prompt[1:] != prompt[:-1])])
    ahead = np.full(len(place), length)
    ahead[:-1] = np.where(new[1:], length, np.minimum(np.diff(place), length))
    starts = np.flatnonzero(new)
    return prompt[starts], text[starts], np.add.reduceat(ahead, starts)
