"""Which words of held-out prompts many rows of the data share: a passage that is asked about again, a template.

Two rows that share such words alone ask different questions; what is left are a prompt's own words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adder.formatting.similarity.words import hash_sequences, hash_words

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

PASSAGE, PASSAGE_ROWS = 8, 4  # words of a sequence, and rows, above which it is of a shared text
# Two words are of a template or a way of speaking, if so many rows and this share of them have them. Of GSM8K's test
# questions with every twelfth word changed, 267 of 300 are found like this, and 272 if all words count.
TEMPLATE, TEMPLATE_ROWS, TEMPLATE_SHARE = 2, 10, 0.01


class Seen(NamedTuple):
    """Sequences found in some texts (their indices), and in how many of the texts each is, for each length."""

    texts: int
    found: list[tuple[Integers, Integers]]


class SharedWords:
    """Counts in how many rows the word sequences of held-out prompts stand."""

    def __init__(self, words: Hashes, offsets: Integers) -> None:
        """`words`, `offsets`: of the held-out prompts, as `hash_words` returns them."""
        self._size = len(words)
        self._sequences = [_Sequences(words, offsets, length) for length in (PASSAGE, TEMPLATE)]
        self._rows = [np.zeros(len(one.hashes), np.int64) for one in self._sequences]
        self._texts = 0

    def look(self, texts: Sequence[str]) -> Seen:
        """Find the sequences in some texts."""
        return self.look_at(Sequences(*hash_words(texts)))

    def look_at(self, sequences: "Sequences") -> Seen:
        """The same, given the texts' sequences."""
        return Seen(len(sequences.offsets) - 1, [one.count(sequences) for one in self._sequences])

    def add(self, seen: Seen, times: int = 1) -> None:
        """Take what was found in some texts; with `times` -1 take it back."""
        self._texts += times * seen.texts
        for rows, (index, count) in zip(self._rows, seen.found, strict=True):
            rows[index] += times * count

    @property
    def counts(self) -> list[Integers]:
        """In how many rows each sequence was found, for each length, and how many rows there were."""
        return [*self._rows, np.array([self._texts], np.int64)]

    @counts.setter
    def counts(self, counts: list[Integers]) -> None:
        *self._rows, texts = counts
        self._texts = int(texts[0])

    def own(self) -> Mask:
        """Which words of the held-out prompts no shared sequence holds, bool (words,)."""
        limits = (PASSAGE_ROWS, max(TEMPLATE_ROWS, TEMPLATE_SHARE * self._texts))
        own = np.ones(self._size, bool)
        for sequences, rows, limit in zip(self._sequences, self._rows, limits, strict=True):
            shared = sequences.first[(rows > limit)[sequences.index]]
            for place in range(sequences.length):
                own[shared + place] = False
        return own


class Sequences:
    """The word sequences of some texts, each length hashed once. `words`, `offsets`: as `hash_words` returns them."""

    def __init__(self, words: Hashes, offsets: Integers) -> None:
        self.words, self.offsets = words, offsets
        self._of_length: dict[int, tuple[Hashes, Integers]] = {}

    def of(self, length: int) -> tuple[Hashes, Integers]:
        """Hashes of all of so many words, and the word that each begins at."""
        if length not in self._of_length:
            self._of_length[length] = hash_sequences(self.words, self.offsets, length)
        return self._of_length[length]

    def texts(self, first: Integers) -> Integers:
        """The texts that sequences are in, given the words that they begin at."""
        return np.searchsorted(self.offsets, first, side="right") - 1


class Lookup:
    """Sorted distinct hashes, and their places among these."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        # Most sequences are not there: a table of bits answers that in a few nanoseconds.
        bits = max(16, (16 * len(hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)
        self._maybe[hashes >> self._shift] = True

    def find(self, hashes: Hashes) -> tuple[Integers, Integers]:
        """Which of some hashes are there (their indices, ascending), and the place of each of these."""
        maybe = np.flatnonzero(self._maybe[hashes >> self._shift])
        if not len(maybe) or not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        place = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        there = self.hashes[place] == hashes[maybe]
        return maybe[there], place[there]


class _Sequences:
    """The distinct sequences of one length, sorted, and where in the words each begins."""

    def __init__(self, words: Hashes, offsets: Integers, length: int) -> None:
        self.length = length
        hashes, self.first = hash_sequences(words, offsets, length)
        distinct, self.index = np.unique(hashes, return_inverse=True)
        self.hashes = distinct
        self._lookup = Lookup(distinct)

    def count(self, sequences: Sequences) -> tuple[Integers, Integers]:
        """Indices of the sequences in some texts, and in how many of the texts each is."""
        hashes, first = sequences.of(self.length)
        hits, place = self._lookup.find(hashes)
        if not len(hits):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        pairs = np.unique(place * len(sequences.offsets) + sequences.texts(first[hits]))
        index, count = np.unique(pairs // len(sequences.offsets), return_counts=True)
        return index.astype(np.int64), count.astype(np.int64)
