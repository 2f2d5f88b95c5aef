"""Replies that are no replies, whatever a loss says: cut off, empty, running in circles, all the same.

Light to import: the training's doctor and the report count them too.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ALIKE = 0.9  # of the replies are one and the same text, where the references are more varied than that
FEWEST_ALIKE = 5  # replies of which that can be said
TURNS = 4  # how often a stretch must come again to be a circle, the last time perhaps in part
SHORTEST_CIRCLE = 8  # characters; "no no" and "..." are none
LOOKED_AT = 2000  # characters from a reply's end: the search is linear, but a reply may be long
MANY_WORDS, FEW_KINDS = 40, 0.25  # words from which a reply with so few kinds of three words in a row is a circle too


class ReplyFaults(NamedTuple):
    """How many of so many replies are cut off, empty, or run in circles; how many are the commonest text.

    A reply may be several of these. alike: 0 unless nearly all are one text though their references are not.
    """

    replies: int
    unended: int
    empty: int
    circling: int
    alike: int
    faulty: int

    @property
    def share(self) -> float:
        """Of the replies, those that have one of these faults."""
        return self.faulty / self.replies if self.replies else 0.0


def find_faults(replies: Sequence[str], references: Sequence[str], ended: Sequence[bool]) -> ReplyFaults:
    """Count the faults of `replies`; all have one entry a reply. `ended`: whether it ended by itself.

    A reply runs in circles where its reference doesn't.
    """
    texts, wanted = [reply.strip() for reply in replies], [reference.strip() for reference in references]
    unended, empty = (
        [not end for end in ended],
        [not text and bool(right) for text, right in zip(texts, wanted, strict=True)],
    )
    circling = [circles(text) and not circles(right) for text, right in zip(texts, wanted, strict=True)]
    (common, count), (_, usual) = _commonest(texts), _commonest(wanted)
    many = len(texts) >= FEWEST_ALIKE and count >= ALIKE * len(texts) and usual < ALIKE * len(texts)
    alike = [many and text == common for text in texts]
    found = list(zip(unended, empty, circling, alike, strict=True))
    return ReplyFaults(len(texts), sum(unended), sum(empty), sum(circling), sum(alike), sum(map(any, found)))


def in_words(faults: ReplyFaults, least: float = 0.0) -> list[str]:
    """Each fault that at least the share `least` of the replies have, as "3 of 40 replies are cut off"."""
    of = f"of {faults.replies:,} replies"
    found = (
        (faults.unended, "were cut off"),
        (faults.empty, "are empty"),
        (faults.circling, "repeat the same words"),
        (faults.alike, "are one and the same text"),
    )
    return [f"{count:,} {of} {what}" for count, what in found if count and count >= least * faults.replies]


def circles(text: str) -> bool:
    """Whether the second half of a text, or more, is one stretch over and over, or the text hardly has other words."""
    end = text[-LOOKED_AT:]
    if _has_tail(end):
        return True
    words = end.lower().split()
    kinds = set(zip(words, words[1:], words[2:], strict=False))
    return len(words) >= MANY_WORDS and len(kinds) < FEW_KINDS * (len(words) - 2)


def _has_tail(text: str) -> bool:
    """Whether half of a text or more, at its end, is one stretch at least TURNS times.

    By Z-function (Gusfield, Algorithms on Strings, Trees, and Sequences, 1997, section 1.3) on the text reversed.
    """
    back, size = text[::-1], len(text)
    same = [0] * size
    left = right = 0
    for place in range(1, size):
        known = min(right - place, same[place - left]) if place < right else 0
        while place + known < size and back[known] == back[place + known]:
            known += 1
        same[place] = known
        if place + known > right:
            left, right = place, place + known
        if place + known >= max(TURNS * place, SHORTEST_CIRCLE, size / 2):
            return True
    return False


def _commonest(texts: Sequence[str]) -> tuple[str, int]:
    return Counter(texts).most_common(1)[0] if texts else ("", 0)
