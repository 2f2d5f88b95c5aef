"""How many packs an optimizer step sees, for the effective batch that was asked for, and how they are split."""

from collections.abc import Sequence, Sized


def packs_per_step(effective_batch: int, seq_lengths: Sequence[Sized]) -> tuple[int, str]:
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


def deal(
    packs: Sequence[int], tokens: Sequence[int], processes: int, passes: int, micro_batch: int
) -> list[list[list[int]]]:
    """Deal the packs of one optimizer step to processes: for each the packs of each of its forward passes.

    `tokens`: of every pack, by its number. Each process gets `passes` forward passes of at most `micro_batch` packs and
    about as many tokens as any other, in the order in which the packs came. Passes that no pack is left for are empty.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    sums = [0] * processes
    for place in sorted(range(len(packs)), key=lambda place: -tokens[packs[place]]):
        least = min((p for p in range(processes) if len(shares[p]) < passes * micro_batch), key=lambda p: sums[p])
        shares[least].append(place)
        sums[least] += tokens[packs[place]]
    dealt = [[packs[place] for place in sorted(share)] for share in shares]
    return [[share[n * micro_batch : (n + 1) * micro_batch] for n in range(passes)] for share in dealt]
