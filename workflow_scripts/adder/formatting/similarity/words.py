"""Words of texts and sequences of them, hashed: what near-duplicates and overlap are found by.

A word is a run of letters, digits and marks, `folded`; in scripts that write no spaces (Han, kana, Thai, ...) each
character is one. Words are hashed for a whole batch of texts at once with numpy: a Python object a word would cost more
than all the rest. Two different sequences have the same 64-bit hash with a chance of about 1e-5 in a comparison of five
million prompts with twenty thousand, so equal hashes count as equal words.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

BLOCK = 1_000_000  # characters hashed at once: about 50 MB of numpy arrays
LONGEST = 128  # words of a sequence, at most
# Scripts written without spaces: Thai and Lao, Tibetan, Burmese, Khmer, kana, Han with its extensions.
UNSPACED = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
# Soft hyphens, joiners, marks of direction and of the order of bytes: they only say how other characters are set.
UNSEEN = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
WIDE = re.compile("[\u3000\uff01-\uffee]+")  # full-width Latin, half-width kana
BETWEEN, LETTER, ALONE = 0, 1, 2  # a character's kind: between words, part of one, or a word by itself
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
# One odd multiplier a place of a sequence, so that order counts.
PLACES = np.random.default_rng(1).integers(0, 2**63, LONGEST, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def folded(text: str) -> str:
    """A text without case, each character in its usual width and with its marks (NFC), without such as nobody sees.

    x² stays another than x2, for which NFKC of the whole would take it.
    """
    if text.isascii():
        return text.casefold()
    plain = WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), UNSEEN.sub("", text))
    return unicodedata.normalize("NFC", plain).casefold()


def prompt_words(text: str) -> list[str]:
    """The words of a text, folded, as they are hashed."""
    plain = folded(text)
    starts, ends, _ = _spans(_codes(plain))
    return [plain[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def hash_words(texts: Sequence[str]) -> tuple[Hashes, Integers]:
    """Hashes of all words of all texts, uint64 (words,), and where each text's begin and end, int64 (texts + 1,)."""
    hashes, counts = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)]
    for block in _blocks(texts):
        plain = [folded(text) for text in block]
        ends = np.cumsum([len(text) + 1 for text in plain])
        codes = _codes("\n".join(plain))
        starts, _, inside = _spans(codes)
        hashes.append(_hash_spans(codes, starts, inside))
        counts.append(np.diff(np.searchsorted(starts, ends), prepend=0))
    return np.concatenate(hashes), np.cumsum(np.concatenate(counts))


def hash_sequences(words: Hashes, offsets: Integers, length: int) -> tuple[Hashes, Integers]:
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
def kinds() -> npt.NDArray[np.uint8]:
    """The kind of every character, uint8 (0x110000,)."""
    found = np.zeros(0x110000, np.uint8)
    for code in range(0x30000):  # beyond it are only rare Han, filled in below, and signs that are in no word
        character = chr(code)
        if character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M":
            found[code] = LETTER
    found[0x30000:0x323B0] = LETTER
    for first, last in UNSPACED:
        found[first : last + 1] *= ALONE
    return found


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _spans(codes: Codes) -> tuple[Integers, Integers, Mask]:
    """Where words start and end (exclusive), and whether each character is in one."""
    kind = kinds()[codes]
    inside = kind > BETWEEN
    letters = kind == LETTER
    continued = letters[1:] & letters[:-1]
    starts, ends = inside.copy(), inside.copy()
    starts[1:] &= ~continued
    ends[:-1] &= ~continued
    return np.flatnonzero(starts), np.flatnonzero(ends) + 1, inside


def _hash_spans(codes: Codes, starts: Integers, inside: Mask) -> Hashes:
    """A word's characters as the digits of a number modulo 2**64, mixed: the same wherever the word stands."""
    if not len(starts):
        return np.empty(0, np.uint64)
    powers, inverses = _powers(1 << (len(codes) - 1).bit_length())
    digits = codes * powers[: len(codes)]
    digits *= inside
    return _mixed(np.add.reduceat(digits, starts) * inverses[starts])


@cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """BASE to the powers 0, 1, ... and to 0, -1, ..., both uint64 (count,), modulo 2**64."""
    inverse = np.uint64(pow(int(BASE), -1, 2**64))
    up, down = np.full(count, BASE), np.full(count, inverse)
    up[0] = down[0] = 1
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)


def _mixed(values: Hashes) -> Hashes:
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
