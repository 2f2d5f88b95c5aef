"""Training rows that are a held-out row with a few words changed: nearly the same prompt, nearly the same reply; or the
same reply, and a prompt that was cut, extended or put in another order.

The 8-word sequences of `heldout_overlap` miss a short prompt of which one word is another, and a whole row's similarity
misses it where its words are few. Candidates are pairs of rows with the same reply, where few rows have it, pairs whose
MinHash signatures are alike, and pairs whose prompts share some 8-word sequences; a candidate counts where both texts,
aligned word by word, agree, or where the replies do and one prompt's words stand in the other.
"""

import difflib
from collections import Counter
from typing import Literal

import numpy as np
import numpy.typing as npt

from adder.formatting.replies import ANSWERED
from adder.formatting.similarity.minhash import MOST_COMPARED, Signatures, band_keys, band_shape, estimated_similarity
from adder.formatting.similarity.words import hash_words

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Candidate = Literal["rare reply", "common reply", "alike", "partly"]
"""Why two rows are compared: an equal reply that few rows have, or some; most words; a part of the prompt's words."""

FEW = 4  # rows on a side that may have one reply, for it to tell a row; "yes" or a label is many rows'
MANY = 50  # training rows that may have a long one: a row is sometimes copied in many ways
ALIKE_PROMPT = 0.7  # of the held-out prompt's own words, in their order
ALIKE_REPLY = 0.5  # of both replies' words, in their order
SAME_PROMPT = 0.75  # of the shorter prompt's words, in any order, where the replies are equal
HALF_OWN = 0.5  # of the words that are a prompt's own, if these are too few to go by alone
ENOUGH_WORDS = 3  # of a prompt
PARTLY = 0.25  # of a held-out prompt's words in 8-word sequences, from which on it is worth to look at the reply too
LONG_REPLY, SAME_REPLY = 8, 0.7  # words from which on a reply tells a row though a few of them, of this share, differ
MOST_WORDS = 600  # of a text that are aligned: that is quadratic at worst


def twin_method(similarity: float | None) -> str:
    """How nearly equal rows are found, as a sentence for people. `similarity`: None where rows are not signed."""
    signed = (
        f", at least {100 * similarity:g} % of the 3-word sequences of both rows (MinHash)"
        if similarity is not None
        else ""
    )
    return (
        f"A training row is nearly a held-out row where they share a reply that at most {FEW} rows on a side have (of "
        f"{LONG_REPLY} words and more: {MANY} training rows)"
        f"{signed}, or {100 * PARTLY:g} % of the held-out prompt's words in 8-word sequences, and where at least "
        f"{100 * ALIKE_PROMPT:g} % of the held-out prompt's own words and {100 * ALIKE_REPLY:g} % of the replies' "
        f"words agree in order; or, where the reply is the same, or has {LONG_REPLY} words and more of which "
        f"{100 * SAME_REPLY:g} % agree, where {100 * SAME_PROMPT:g} % of the shorter prompt's own words stand in the "
        "other in any order: a prompt that was cut, extended or turned round. A short prompt that was changed so, and "
        "whose reply was too, isn't found."
    )


def same_reply_pairs(train: Hashes, held: Hashes, most: int = FEW) -> list[tuple[int, int]]:
    """Pairs (index in `train`, index in `held`) of equal replies that at most so many rows of `train` and FEW of `held`
    have; `train`, `held`: their keys, 0 for an empty one.
    """
    train, held = train & ~ANSWERED, held & ~ANSWERED
    values, first, counts = np.unique(held, return_index=True, return_counts=True)
    order = np.argsort(held, kind="stable")
    starts = np.cumsum(counts) - counts
    place = np.minimum(np.searchsorted(values, train), max(len(values) - 1, 0))
    hits = np.flatnonzero((values[place] == train) & (train != 0)) if len(values) else np.empty(0, np.int64)
    often = np.bincount(place[hits], minlength=len(first)) if len(hits) else np.zeros(len(first), np.int64)
    pairs: list[tuple[int, int]] = []
    for index in hits.tolist():
        value = int(place[index])
        if often[value] <= most and counts[value] <= FEW:
            pairs += [(index, int(one)) for one in order[starts[value] : starts[value] + counts[value]]]
    return pairs


def similar_pairs(signatures: Signatures, train: Integers, held: Integers, similarity: float) -> list[tuple[int, int]]:
    """Pairs (row of `train`, row of `held`) with an estimated similarity of at least `similarity`.

    `signatures`: uint8 (all rows, PERMUTATIONS). Of a bucket's held-out rows the first MOST_COMPARED are compared.
    """
    bands, width = band_shape(similarity)
    pairs: set[tuple[int, int]] = set()
    for band in range(bands if len(train) and len(held) else 0):
        own = slice(band * width, (band + 1) * width)
        keys, of = band_keys(signatures[held, own]), band_keys(signatures[train, own])
        order = np.argsort(keys, kind="stable")
        low = np.searchsorted(keys[order], of, side="left")
        high = np.searchsorted(keys[order], of, side="right")
        for index in np.flatnonzero(high > low).tolist():
            for one in order[low[index] : min(high[index], low[index] + MOST_COMPARED)].tolist():
                pairs.add((int(train[index]), int(held[one])))
    return [
        pair for pair in sorted(pairs) if estimated_similarity(signatures[pair[0]], signatures[pair[1]]) >= similarity
    ]


def agreement(train: str, held: str, own: Mask | None = None) -> float:
    """The share of the held-out text's words that the training text has in the same order; of its `own` words if any.

    own: bool (words of `held`,), as `hash_words` finds them. Two empty texts agree.
    """
    one, other = (hash_words([text])[0][:MOST_WORDS].tolist() for text in (train, held))
    counted = np.ones(len(other), bool) if own is None or not own[: len(other)].any() else own[: len(other)]
    if not len(other):
        return float(not one)
    matched = np.zeros(len(other), bool)
    for _, start, size in difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        matched[start : start + size] = True
    # Words that only the training text has weigh as those that only the other one has: it may be a longer request.
    more = max(0, len(one) - len(other))
    return float((matched & counted).sum() / (counted.sum() + more))


def are_twins(train: tuple[str, str], held: tuple[str, str], own: Mask, how: Candidate = "alike") -> float | None:
    """How far the prompts of two (prompt, reply) agree, where they are nearly one row; None where they aren't.

    A held-out row without a reply, such as one of a protected test set, goes by its prompt alone. `how`: why the two
    are compared.
    """
    long = len(hash_words([held[1]])[0]) >= LONG_REPLY
    replies = min(agreement(train[1], held[1]), agreement(held[1], train[1])) if held[1] else 1.0
    telling = how == "rare reply" or (long and replies >= SAME_REPLY)
    if how in ("common reply", "partly") and not telling:
        return None
    if telling and (shared := shared_share(train[0], held[0], own)) >= SAME_PROMPT:
        return shared
    prompt = agreement(train[0], held[0], own)
    return prompt if prompt >= ALIKE_PROMPT and replies >= ALIKE_REPLY else None


def shared_share(train: str, held: str, own: Mask) -> float:
    """The share of the shorter prompt's words that the other has too, in any order; 0 where it has too few words.

    own: bool (words of `held`,). What isn't its own counts on neither side, or, where that leaves too few words, counts
    if half of its own words stand in the other too.
    """
    one, other = (hash_words([text])[0] for text in (train, held))
    left, kept = Counter(one.tolist()), Counter(other[own].tolist())
    left.subtract(other[~own].tolist())
    left, same = +left, (left & kept).total()
    shorter = min(left.total(), kept.total())
    if shorter >= ENOUGH_WORDS:
        return same / shorter
    every = min(len(one), len(other))
    if every < ENOUGH_WORDS or same < HALF_OWN * shorter:
        return 0.0
    return (Counter(one.tolist()) & Counter(other.tolist())).total() / every
