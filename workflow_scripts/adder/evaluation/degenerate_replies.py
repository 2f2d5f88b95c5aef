"""Replies that are no replies, whatever a loss says: cut off, empty, running in circles, all the same, the prompt.

Light to import: the training's doctor and the report count them too.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean
from typing import NamedTuple

from adder.evaluation.records import SampleRecord
from adder.formatting.similarity.words import prompt_words

ALIKE = 0.9  # of the replies are one text, or a few, where the references are more varied than that
FEWER = 5  # times as few texts as the references have
FEWEST_ALIKE = 5  # replies of which that can be said
NEARLY = 0.8  # of a text's words are the most typical one's
TYPICAL = 30  # texts that this one is found among, or twice as many
TURNS = 4  # how often a stretch must come again to be a circle, the last time perhaps in part
LONG, LONG_TURNS = 100, 3  # characters of a stretch that need not come again so often
DIGITS, WORDS = re.compile(r"\d+"), re.compile(r"\w+")
SHORTEST_CIRCLE = 8  # characters; "no no" and "..." are none
LOOKED_AT = 2000  # characters from a reply's end: the search is linear, but a reply may be long
ECHO = 4  # words of a sequence that a reply and its prompt share; a shorter message is repeated only as a whole
REPEATED, OWN = 0.8, 0.9  # of a message's words, and of a reply's, in such sequences, for one to be the other's echo
HALF, BEGUN = 0.5, 8  # of the message at least, or so many words that begin as it does
CONTROL = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]")  # tokens between the turns of a rendered prompt
MANY_WORDS, FEW_KINDS = 40, 0.25  # words from which a reply with so few kinds of three words in a row is a circle too


class ReplyFaults(NamedTuple):
    """How many of so many replies are cut off, empty, run in circles, echo their prompt; how many are one of the few
    commonest texts.

    A reply may be several of these. alike: 0 unless nearly all are one text, or very few, though their references are
    not; alike_as: which texts these are, in words.
    """

    replies: int
    unended: int
    empty: int
    circling: int
    alike: int
    echoing: int
    faulty: int
    alike_as: str = ""

    @property
    def share(self) -> float:
        """Of the replies, those that have one of these faults."""
        return self.faulty / self.replies if self.replies else 0.0


def find_faults(
    replies: Sequence[str], references: Sequence[str], ended: Sequence[bool], prompts: Sequence[Sequence[str]] = ()
) -> ReplyFaults:
    """Count the faults of `replies`; all have one entry a reply. `ended`: whether it ended by itself. `prompts`: the
    messages that it replies to, the last one last; without them no echo is looked for.

    A reply runs in circles where its reference doesn't, and echoes its prompt where less than half of its reference
    is from there.
    """
    texts, wanted = [reply.strip() for reply in replies], [reference.strip() for reference in references]
    unended, empty = (
        [not end for end in ended],
        [not _shows(text) and _shows(right) for text, right in zip(texts, wanted, strict=True)],
    )
    circling = [circles(text) and not circles(right) for text, right in zip(texts, wanted, strict=True)]
    alike, alike_as = _alike(texts, wanted)
    echoing = [
        echoes(text, said) and not _draws_on(right, said)
        for text, right, said in zip(texts, wanted, prompts or [[]] * len(texts), strict=True)
    ]
    found = list(zip(unended, empty, circling, alike, echoing, strict=True))
    counts = map(sum, (unended, empty, circling, alike, echoing, map(any, found)))
    return ReplyFaults(len(texts), *counts, alike_as=alike_as)


def faults_of(samples: Sequence[SampleRecord]) -> ReplyFaults:
    """What is wrong with a model's replies to held-out rows; texts without a prompt have none."""
    asked = [(sample, reply) for sample in samples if (reply := sample["reply"]) is not None]
    return find_faults(
        [reply for _, reply in asked],
        [sample["reference"] for sample, _ in asked],
        [not sample.get("truncated", False) for sample, _ in asked],
        [[turn["content"] for turn in sample["prompt"] if turn["role"] != "tool"] for sample, _ in asked],
    )


def in_words(faults: ReplyFaults, least: float = 0.0) -> list[str]:
    """Each fault that at least the share `least` of the replies have, as "3 of 40 replies are cut off"."""
    of = f"of {faults.replies:,} replies"
    found = (
        (faults.unended, "were cut off"),
        (faults.empty, "are empty"),
        (faults.circling, "repeat the same words"),
        (faults.alike, f"are {faults.alike_as}"),
        (faults.echoing, "repeat what their prompt says"),
    )
    return [f"{count:,} {of} {what}" for count, what in found if count and count >= least * faults.replies]


def circles(text: str) -> bool:
    """Whether the second half of a text, or more, is one stretch over and over, or the text hardly has other words."""
    if _has_tail(text[-LOOKED_AT:]):
        return True
    words = text[-LOOKED_AT:].lower().split()
    kinds = set(zip(words, words[1:], words[2:], strict=False))
    return len(words) >= MANY_WORDS and len(kinds) < FEW_KINDS * (len(words) - 2)


def echoes(reply: str, messages: Sequence[str]) -> bool:
    """Whether a reply is a message of its prompt said again, whole or most of it, whatever else it adds."""
    own = prompt_words(reply)
    said = [prompt_words(message) for message in messages]
    return any(_repeats(own, one) for one in said) or bool(said and own and own == said[-1])


def turns(rendered: str) -> list[str]:
    """The messages of a prompt as a chat template rendered it, roles and all, as far as control tokens part them."""
    return [part for part in map(str.strip, CONTROL.split(rendered)) if part]


def _draws_on(reference: str, messages: Sequence[str]) -> bool:
    """Whether half of a reference or more stands in one of the messages, as where a text is to be corrected."""
    own = prompt_words(reference)
    said = [prompt_words(message) for message in messages]
    return bool(own) and any(own == one or _covered(own, one) >= HALF * len(own) for one in said)


def _repeats(own: list[str], said: list[str]) -> bool:
    if min(len(own), len(said)) < ECHO:
        return False
    again = _covered(said, own)
    if again >= REPEATED * len(said):
        return True
    begun = len(own) >= BEGUN and own[:ECHO] == said[:ECHO]
    return _covered(own, said) >= OWN * len(own) and (begun or again >= HALF * len(said))


def _covered(words: list[str], other: list[str]) -> int:
    """How many of the words stand in a sequence of ECHO words that the other text has too."""
    known = set(zip(*(other[place:] for place in range(ECHO)), strict=False))
    count = end = 0
    for start, sequence in enumerate(zip(*(words[place:] for place in range(ECHO)), strict=False)):
        if sequence in known:
            count += start + ECHO - max(end, start)
            end = start + ECHO
    return count


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
    near = [one >= NEARLY for one in _nearness(texts)]
    if len(texts) >= FEWEST_ALIKE and sum(near) >= ALIKE * len(texts) and mean(_nearness(wanted)) < HALF:
        return near, "nearly one and the same text"
    return [False] * len(texts), ""


def _nearness(texts: Sequence[str]) -> list[float]:
    """How much of each text's words, and of the most typical text's, both have, 0 to 1 (Dice's coefficient)."""
    counted = [Counter(DIGITS.sub("0", word) for word in prompt_words(text)) for text in texts]
    sample = counted[:: max(1, len(texts) // TYPICAL)]
    typical = max(sample, key=lambda one: sum(_likeness(one, other) for other in sample), default=Counter[str]())
    return [_likeness(one, typical) for one in counted]


def _likeness(one: Counter[str], other: Counter[str]) -> float:
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 0.0


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
