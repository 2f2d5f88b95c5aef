"""How many packs an optimizer step sees, for the effective batch that was asked for, and how they may be split."""

from collections.abc import Sequence


def packs_per_step(effective_batch: int, seq_lengths: Sequence[Sequence[int]]) -> tuple[int, str]:
    """Return how many packs hold about `effective_batch` examples, at least one, and the sentence that says so.

    `seq_lengths`: token counts of the examples in each pack.
    """
    per_pack = sum(map(len, seq_lengths)) / len(seq_lengths)
    packs = min(len(seq_lengths), max(1, round(effective_batch / per_pack)))
    return packs, (
        f"{effective_batch} examples a step were asked for and a pack holds {per_pack:.1f} on average: "
        f"{packs_in_words(packs)} with {packs * per_pack:.1f} examples a step"
    )


def packs_in_words(number: int) -> str:
    """ "1 pack", "2 packs"."""
    return f"{number} pack" if number == 1 else f"{number} packs"


def divisors(number: int) -> list[int]:
    """Divisors of a whole number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
