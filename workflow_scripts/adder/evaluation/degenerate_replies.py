"""Replies that are no replies, whatever a loss says: cut off, empty, running in circles, all the same.

Light to import: the training's doctor and the report count them too.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

ALIKE = 0.9  # of the replies are one text, or a few, where the references are more varied than that
FEWER = 5  # times as few texts as the references have
FEWEST_ALIKE = 5  # replies of which that can be said
TURNS = 4  # how often a stretch must come again to be a circle, the last time perhaps in part
LONG, LONG_TURNS = 100, 3  # characters of a stretch that need not come again so often
DIGITS, WORDS = re.compile(r"\d+"), re.compile(r"\w+")
SHORTEST_CIRCLE = 8  # characters; "no no" and "..." are none
LOOKED_AT = 2000  # characters from a reply's end: the search is linear, but a reply may be long
MANY_WORDS, FEW_KINDS = 40, 0.25  # words from which a reply with so few kinds of three words in a row is a circle too


class ReplyFaults(NamedTuple):
    """How many of so many replies are cut off, empty, or run in circles; how many are one of the few commonest texts.

    A reply may be several of these. alike: 0 unless nearly all are one text, or very few, though their references are
    not; alike_as: which texts these are, in words.
    """

    replies: int
    unended: int
    empty: int
    circling: int
    alike: int
    faulty: int
    alike_as: str = ""

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
        [not _shows(text) and _shows(right) for text, right in zip(texts, wanted, strict=True)],
    )
    circling = [circles(text) and not circles(right) for text, right in zip(texts, wanted, strict=True)]
    alike, alike_as = _alike(texts, wanted)
    found = list(zip(unended, empty, circling, alike, strict=True))
    counts = map(sum, (unended, empty, circling, alike, map(any, found)))
    return ReplyFaults(len(texts), *counts, alike_as=alike_as)


def in_words(faults: ReplyFaults, least: float = 0.0) -> list[str]:
    """Each fault that at least the share `least` of the replies have, as "3 of 40 replies are cut off"."""
    of = f"of {faults.replies:,} replies"
    found = (
        (faults.unended, "were cut off"),
        (faults.empty, "are empty"),
        (faults.circling, "repeat the same words"),
        (faults.alike, f"are {faults.alike_as}"),
    )
    return [f"{count:,} {of} {what}" for count, what in found if count and count >= least * faults.replies]


def circles(text: str) -> bool:
    """Whether the second half of a text, or more, is one stretch over and over, or the text hardly has other words."""
    if _has_tail(text[-LOOKED_AT:]):
        return True
    words = text[-LOOKED_AT:].lower().split()
    kinds = set(zip(words, words[1:], words[2:], strict=False))
    return len(words) >= MANY_WORDS and len(kinds) < FEW_KINDS * (len(words) - 2)


def _has_tail(text: str) -> bool:
    """Whether half of a text or more, at its end, is one stretch at least TURNS times, or LONG_TURNS where it is long.

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
        turns = TURNS if place < LONG else LONG_TURNS
        if place + known >= max(turns * place, SHORTEST_CIRCLE, size / 2):
            return True
    return False


def _alike(texts: Sequence[str], wanted: Sequence[str]) -> tuple[list[bool], str]:
    """Which texts are one of the very few that nearly all are, and which these are, in words."""
    forms: tuple[tuple[Callable[[str], str], str], ...] = ((str, ""), (_plain, " but for numbers and marks"))
    for form, aside in forms if len(texts) >= FEWEST_ALIKE else ():
        own = [form(text) for text in texts]
        few, usual = _commonest(own), len(_commonest([form(text) for text in wanted]))
        comes_again = all(own.count(text) > 1 for text in few)
        if comes_again and (len(few) * FEWER <= usual or len(few) == 1 < usual):
            return [text in few for text in own], (
                "one and the same text" if len(few) == 1 else f"one of {len(few)} texts"
            ) + aside
    return [False] * len(texts), ""


def _commonest(texts: Sequence[str]) -> set[str]:
    """The fewest texts that are so large a share of them all."""
    found: set[str] = set()
    covered = 0
    for text, count in Counter(texts).most_common():
        if covered >= ALIKE * len(texts):
            break
        found.add(text)
        covered += count
    return found


def _plain(text: str) -> str:
    """A text's words, in lower case, with each number as 0."""
    return DIGITS.sub("0", " ".join(WORDS.findall(text.casefold()))) or text


def _shows(text: str) -> bool:
    """Whether a text has a character that can be seen."""
    return any(unicodedata.category(letter)[0] not in "CZ" and letter != "\ufffd" for letter in text)
