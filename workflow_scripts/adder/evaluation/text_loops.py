"""Replies that repeat themselves: greedy decoding that has fallen into a short loop rarely leaves it again.

A base model that was never taught to stop often does that, up to the last token that it is allowed.
"""

from collections.abc import Sequence

LOOP_TOKENS = 128  # that a repetition must have lasted before it counts as one that doesn't end
LONGEST_PERIOD = LOOP_TOKENS // 4  # so it has come at least four times
EVERY = 16  # tokens between two looks


def loop_period(ids: Sequence[int], new: int) -> int | None:
    """After how many tokens the last LOOP_TOKENS repeat, at most LONGEST_PERIOD; None where they don't.

    It is looked at once in EVERY tokens, where the last `new` ones complete so many.
    """
    if len(ids) < LOOP_TOKENS or len(ids) % EVERY >= new:
        return None
    tail = list(ids[-LOOP_TOKENS:])
    return next((period for period in range(1, LONGEST_PERIOD + 1) if tail[period:] == tail[:-period]), None)


def has_loop(ids: Sequence[int]) -> bool:
    """Whether a text of these tokens holds such a repetition anywhere."""
    return any(loop_period(ids[:end], EVERY) is not None for end in range(LOOP_TOKENS, len(ids) + 1, EVERY))


def continue_loop(ids: Sequence[int], period: int, length: int) -> list[int]:
    """The tokens, and the last `period` of them again and again, `length` together."""
    unit = list(ids[-period:])
    return [*ids, *(unit[number % period] for number in range(length - len(ids)))]
