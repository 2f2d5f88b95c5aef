"""Overlap of training prompts with the prompts that judge the model, found by the sequences of words they share."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from adder.formatting.similarity.shared_words import (
    PASSAGE,
    PASSAGE_ROWS,
    TEMPLATE,
    TEMPLATE_ROWS,
    TEMPLATE_SHARE,
    Lookup,
    Seen,
    Sequences,
    SharedWords,
)
from adder.formatting.similarity.words import hash_sequences, hash_words

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

NGRAM = 8  # words
SHORTEST = 4  # words of a held-out prompt, below which only equality counts
# Sequences in more held-out prompts than this are boilerplate. Ten is also where NVIDIA's NeMo Curator begins to call
# one too common (TaskDecontamination, max_matches).
COMMON = 10


def overlap_method(share: float) -> str:
    """How overlap with held-out and test prompts is found, as a sentence for people."""
    return (
        f"A training prompt overlaps with a held-out or test prompt where more than {100 * share:g} % of that prompt's "
        f"words lie in {NGRAM}-word sequences that both have, or where a whole prompt of {SHORTEST} to {NGRAM - 1} "
        f"words makes up more than {100 * share:g} % of it (Lambert et al. 2024, Tülu 3, arXiv:2411.15124, section "
        f"3.2); sequences in more than {COMMON} such prompts are boilerplate and don't count. Only words of a prompt's "
        f"own count: not those of {PASSAGE}-word sequences in more than {PASSAGE_ROWS} rows of the data (a shared "
        f"passage), nor of {TEMPLATE}-word sequences in more than {TEMPLATE_ROWS} rows and {100 * TEMPLATE_SHARE:g} % "
        f"of them (a template). A prompt with fewer than {SHORTEST} overlaps where it stands whole in the other."
    )


class HeldoutIndex:
    """Finds training prompts that overlap with a held-out or test prompt.

    The rule is that of Lambert et al. 2024 (Tülu 3, arXiv:2411.15124, section 3.2, there on tokens): a held-out word
    counts if it lies in an 8-word sequence that the same training prompt has too, and the two overlap where more than
    `share` of the held-out prompt's words do. Two additions:
    - A held-out prompt of 4 to 7 words overlaps where all of it stands in the training prompt and makes up more than
      `share` of that: a longer request that begins with a common short one is another request.
    - Sequences that stand in many held-out prompts (more than COMMON, or than half of fewer than 20) are boilerplate,
      such as an instruction before every question: words that lie in no other sequence count for neither side.
    - `leave_out_shared`: words that many rows of the data share count for neither side either. Of a prompt that has
      fewer than SHORTEST others all sequences must stand in the training prompt, and make up more than `share` of it.
    """

    def __init__(self, prompts: Sequence[str], share: float) -> None:
        self.share = share
        words, offsets = hash_words(prompts)
        lengths = np.diff(offsets)
        self.shared = SharedWords(words, offsets)
        self._offsets, self._lengths = offsets, lengths
        self._own = np.ones(len(words), bool)
        self._of = _distinct(words, offsets)  # equal prompts are one, named by the first
        self._tables = [self._table(words, offsets, length, lengths == length) for length in range(SHORTEST, NGRAM)]
        self._tables.append(self._table(words, offsets, NGRAM, lengths >= NGRAM))
        self._tables = [table for table in self._tables if len(table.hashes)]

    def leave_out_shared(self) -> None:
        """Count from now on only words that the data counted by `self.shared` don't share."""
        self._own = self.shared.own()
        before = np.concatenate([[0], np.cumsum(self._own)])
        for table in self._tables:
            if table.length == NGRAM:
                table.own(before, self._offsets[:-1])

    def look(self, texts: Sequence[str]) -> tuple[Seen, Integers]:
        """What `shared` finds in some training prompts, and which of these have a sequence of a held-out prompt."""
        sequences = Sequences(*hash_words(texts))
        touched = [np.empty(0, np.int64)]
        for table in self._tables:
            hashes, first = sequences.of(table.length)
            touched.append(sequences.texts(first[table.find(hashes)[0]]))
        return self.shared.look_at(sequences), np.unique(np.concatenate(touched))

    def own_words(self, prompt: int) -> npt.NDArray[np.bool_]:
        """Which words of a held-out prompt are its own, bool (words,)."""
        return self._own[self._offsets[prompt] : self._offsets[prompt + 1]]

    def overlaps(self, texts: Sequence[str], least: float | None = None) -> list[tuple[int, float] | None]:
        """For each training prompt the held-out prompt (its index) with the largest share above `least`, by default the
        limit, and that share; the first of equals; None where there is none.
        """
        least = self.share if least is None else least
        sequences = Sequences(*hash_words(texts))
        sizes = np.diff(sequences.offsets)
        best: list[tuple[int, float] | None] = [None] * len(texts)
        for table in self._tables:
            hashes, first = sequences.of(table.length)
            hits, found = table.find(hashes)
            if not len(hits):
                continue
            for text, prompt, share, whole in table.shares(sequences.texts(first[hits]), found):
                earlier = best[text]
                if whole and self._lengths[prompt] <= self.share * sizes[text]:
                    continue
                if table.length < NGRAM and table.length <= self.share * sizes[text]:
                    continue
                if share > least and (earlier is None or (-share, prompt) < (-earlier[1], earlier[0])):
                    best[text] = (prompt, share)
        return best

    def _table(self, words: Hashes, offsets: Integers, length: int, members: npt.NDArray[np.bool_]) -> "_Table":
        members = members & (self._of == np.arange(len(self._of)))
        hashes, first = hash_sequences(words, offsets, length)
        prompt = np.searchsorted(offsets, first, side="right") - 1
        taken = members[prompt]
        prompts = int(members.sum())
        return _Table(hashes[taken], prompt[taken], (first - offsets[prompt])[taken], length, prompts)


class _Table:
    """The held-out sequences of one length, boilerplate left out: sorted distinct hashes, and where each stands."""

    def __init__(self, hashes: Hashes, prompt: Integers, place: Integers, length: int, prompts: int) -> None:
        self.length = length
        order = np.lexsort((place, prompt, hashes))
        hashes, prompt, place = hashes[order], prompt[order], place[order]
        rare = _prompts_with(hashes, prompt) <= min(COMMON, max(2, prompts // 2))
        self._prompt, self._place = prompt[rare], place[rare]
        self.hashes, self._start, self._count = np.unique(hashes[rare], return_index=True, return_counts=True)
        self._before: Integers | None = None  # of the words before each, how many are their prompt's own
        self._starts = np.zeros(0, np.int64)
        self._words, self._own = self._words_of(own=False), dict[int, int]()
        self._lookup = Lookup(self.hashes)

    def own(self, before: Integers, starts: Integers) -> None:
        """Count only prompts' own words. before: how many of the words before each are; starts: where prompts begin."""
        self._before, self._starts = before, starts
        self._own = self._words_of(own=True)

    def _words_of(self, own: bool) -> dict[int, int]:
        """How many words of each prompt lie in a sequence."""
        text = np.zeros(len(self._prompt), np.int64)
        prompt, _, covered = _cover(text, self._prompt, self._place, self.length, *(self._weights(own)))
        return dict(zip(prompt.tolist(), covered.tolist(), strict=True))

    def _weights(self, own: bool) -> tuple[Integers | None, Integers]:
        return (self._before if own else None), self._starts

    def find(self, hashes: Hashes) -> tuple[Integers, Integers]:
        """Which of some hashes are among `self.hashes`, and their indices there."""
        return self._lookup.find(hashes)

    def shares(self, text: Integers, found: Integers) -> Iterator[tuple[int, int, float, bool]]:
        """Each text and held-out prompt with a common sequence, the share of the prompt's words in such, and whether
        that is of all its words, for want of enough that are its own.

        `text`, `found`: one entry a sequence, the text that has it and its index among `self.hashes`.
        """
        count = self._count[found]
        entry = np.repeat(self._start[found] - (np.cumsum(count) - count), count) + np.arange(count.sum())
        found_in = np.repeat(text, count), self._prompt[entry], self._place[entry], self.length
        prompt, texts, covered = _cover(*found_in, *self._weights(own=False))
        own = covered if self._before is None else _cover(*found_in, *self._weights(own=True))[2]
        for one, other, words, few in zip(texts.tolist(), prompt.tolist(), covered.tolist(), own.tolist(), strict=True):
            if self._before is None:
                yield one, other, words / self._words[other], False
            elif self._own[other] >= SHORTEST:
                yield one, other, few / self._own[other], False
            elif words == self._words[other]:
                yield one, other, 1.0, True


def _distinct(words: Hashes, offsets: Integers) -> Integers:
    """For each text the first text of the same words; int64 (texts,)."""
    first: dict[bytes, int] = {}
    ends = offsets.tolist()
    pairs = enumerate(itertools.pairwise(ends))
    return np.array([first.setdefault(words[a:b].tobytes(), number) for number, (a, b) in pairs], dtype=np.int64)


def _prompts_with(hashes: Hashes, prompt: Integers) -> Integers:
    """For each entry, sorted by hash and prompt, how many different prompts have its hash."""
    if not len(hashes):
        return np.empty(0, np.int64)
    new_hash = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    new_pair = new_hash | np.concatenate([[True], prompt[1:] != prompt[:-1]])
    counts = np.add.reduceat(new_pair.astype(np.int64), np.flatnonzero(new_hash))
    return counts[np.cumsum(new_hash) - 1]


def _cover(
    text: Integers, prompt: Integers, place: Integers, length: int, before: Integers | None, starts: Integers
) -> tuple[Integers, Integers, Integers]:
    """Each pair of prompt and text, and how many of the prompt's words lie in a sequence that begins at a `place`.

    before, starts: which words count, as _Table.own takes them; all without them.
    """
    order = np.lexsort((place, prompt, text))
    text, prompt, place = text[order], prompt[order], place[order]
    if not len(order):
        return prompt, text, place
    new = np.concatenate([[True], (text[1:] != text[:-1]) | (prompt[1:] != prompt[:-1])])
    ahead = np.full(len(place), length)
    ahead[:-1] = np.where(new[1:], length, np.minimum(np.diff(place), length))
    if before is not None:
        word = starts[prompt] + place
        ahead = before[word + ahead] - before[word]
    first = np.flatnonzero(new)
    return prompt[first], text[first], np.add.reduceat(ahead, first)
