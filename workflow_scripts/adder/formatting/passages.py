"""Which rows ask about one passage: a long line that a few of them have in common, in the prompt or as system message.

What more rows have in common is a template or a way of asking, and no reason to keep rows together.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from adder.formatting.conversation import Conversation
from adder.formatting.similarity.words import folded

Hashes = npt.NDArray[np.uint64]

LINE = 100  # characters of a line that may be a passage's
LINES = 2  # of each row, the longest; the longest of all may be an instruction
MOST_ROWS, MOST_SHARE = 100, 0.1  # rows, and share of all of them, that may ask about one passage
NONE = bytes(8)


def passages_of(conversation: Conversation) -> bytes:
    """Hashes of the longest lines of what a user says, 8 bytes each, 0 for one that isn't there."""
    texts = [message["content"] for message in conversation.get("messages", ()) if message["role"] == "user"]
    lines = [line for text in texts if len(text) >= LINE for line in text.splitlines() if len(line) >= LINE]
    lines = sorted(set(lines), key=lambda line: (-len(line), line))[:LINES]
    hashes = [blake2b(" ".join(folded(line).split()).encode(), digest_size=8).digest() for line in lines]
    return b"".join([*hashes, *[NONE] * (LINES - len(hashes))])


def passage_of_each(lines: Hashes, system: Hashes, prompt: Hashes) -> Hashes:
    """What each of n rows is about: the hash of a passage that other rows are about too; 0 where there is none, (n,).

    lines: (n, LINES), as `passages_of` gives them. system, prompt: hashes of the system message, 0 without one, and of
    what is asked. Rows that ask the same are about the same.
    """
    found = np.zeros(len(prompt), np.uint64)
    for candidates in [*lines.T, system]:
        if candidates.any():
            found = np.where(found == 0, _shared(candidates, prompt), found)
    if not found.any():
        return found
    _, which = np.unique(prompt, return_inverse=True)
    lowest = np.full(int(which.max(initial=-1)) + 1, np.iinfo(np.uint64).max, np.uint64)
    highest = np.zeros_like(lowest)
    np.minimum.at(lowest, which, found)
    np.maximum.at(highest, which, found)
    return np.where((lowest == highest)[which], found, 0)


def _shared(hashes: Hashes, prompt: Hashes) -> Hashes:
    """The hashes that several rows have which ask different things, and not too many of them; 0 for the others."""
    _, first, which, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    differs = np.zeros(len(counts), bool)
    np.logical_or.at(differs, which, prompt != prompt[first][which])
    most = min(MOST_ROWS, MOST_SHARE * len(hashes))
    return np.where(((counts <= most) & differs)[which], hashes, 0)


def joined(parts: Sequence[bytes]) -> Hashes:
    """What `passages_of` gave for some rows, (n, LINES)."""
    return np.frombuffer(b"".join(parts), dtype="<u8").reshape(-1, LINES)


def describe(passage: Hashes, held: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_]) -> str:
    """What was kept together, as the end of a sentence on the split."""
    (all_rows, passages), (rows, some) = (_counted(passage[there]) for there in (held | train, held))
    return (
        f"{all_rows:,} rows ask about {passages:,} passages that several have in common; those about one, the longest "
        f"of theirs, are on one side, and {rows:,} about {some:,} passages are held out"
    )


def _counted(passage: Hashes) -> tuple[int, int]:
    """Rows that are about a passage, and passages."""
    there = passage[passage != 0]
    return len(there), len(np.unique(there))
