"""Which rows are held out, decided by hashes alone, so that the choice stays put when data grow.

All hashes are uint64 arrays, one value a row, uniform over their range.
"""

import numpy as np
import numpy.typing as npt

from adder.core.errors import UserError
from adder.formatting.stage import FormatSettings

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

MISSING = 0  # the hash that stands for "no value" in the column of group_by or stratify_by
RANGE = 2.0**64
FEW_SYSTEMS = 4  # system messages over one prompt, at which it is still the same question


def choose_heldout(settings: FormatSettings, prompt: Hashes, digest: Hashes, value: Hashes | None) -> Mask:
    """Which of n rows are held out, as bool (n,).

    settings: share or size; group_by, stratify_by or neither. `prompt` is the hash of what is asked, `digest` that of
    the whole conversation, `value` that of the column of group_by or stratify_by.

    - share: the rows whose prompt's hash, read as a number in [0, 1), is below it. A row stays where it is whatever is
      added. size: the rows with the lowest hashes; a new row displaces one of them at most.
    - group_by: the value's hash decides in place of the prompt's, so that all its rows go together; a row without one
      goes by its prompt. With a size, groups are taken in the order of their hashes, each that still fits.
    - stratify_by: of each value's rows those with the lowest hashes, as many as its part comes to. A new row displaces
      at most one, of its own value (with a size, rounding may pass one row from a value to another).
    Raises UserError where as much is to be held out as there is.
    """
    share, size = settings.share, settings.size
    if (share is None) == (size is None):
        raise UserError("data.heldout needs one of share, size and sources")
    if size is not None and size >= len(prompt):
        raise UserError(
            f"data.heldout.size is {size:,}, but there are only {len(prompt):,} usable rows and some must be left to "
            "train on"
        )
    if settings.stratify_by and value is not None:
        return _stratified(share, size, prompt, digest, value)
    key = groups_of(prompt, value) if settings.group_by and value is not None else prompt
    if size is None:
        return key < _limit(share or 0.0)
    if settings.group_by:
        return _fitting_groups(key, size, settings.group_by)
    held = np.zeros(len(prompt), dtype=bool)
    held[np.lexsort((digest, prompt))[:size]] = True
    return held


def by_passages(settings: FormatSettings, prompt: Hashes, passage: Hashes) -> Mask | None:
    """Which of n rows are held out so that rows about one passage are on one side, bool (n,); None where another column
    decides, no rows share a passage, or the passages can't be divided in anything like the parts that are asked for.

    A passage's hash decides in place of the prompt's. Where that holds out less than half or more than twice of what is
    asked for, as it may with few passages, they are taken in the order of their hashes, each that still fits.
    """
    if settings.group_by or settings.stratify_by or not settings.keep_passages or not passage.any():
        return None
    key = groups_of(prompt, passage)
    wanted = settings.size if settings.size is not None else max(1, round((settings.share or 0.0) * len(prompt)))
    if settings.size is None:
        held = key < _limit(settings.share or 0.0)
        if wanted / 2 <= held.sum() <= 2 * wanted:
            return held
    taken = _fitting(key, wanted)
    return taken if taken.sum() >= wanted / 2 and wanted < len(prompt) else None


def asked(prompt: Hashes, system: Hashes) -> tuple[Hashes, Mask]:
    """What each row asks: its prompt's hash, or, as the mask says, that of both where the same words stand under many
    system messages.

    The text that such a prompt is about stands in the system message: "Summarise it." asks something else each time.
    """
    if not system.any():
        return prompt, np.zeros(len(prompt), dtype=bool)
    _, which = np.unique(prompt, return_inverse=True)
    pairs = np.unique(np.stack([which.astype(np.uint64), system]), axis=1)[0]
    several = np.bincount(pairs.astype(np.int64), minlength=int(which.max()) + 1) > FEW_SYSTEMS
    both = several[which]
    return np.where(both, scramble(prompt ^ scramble(system, 3), 4), prompt), both


def groups_of(prompt: Hashes, value: Hashes) -> Hashes:
    """What each row goes by under group_by: its value's hash, and without a value its prompt's."""
    return np.where(value == MISSING, prompt, value)


def describe(settings: FormatSettings, held: int, left: int, own_sources: bool, about: str | None = None) -> str:
    """One sentence on how the held-out rows were chosen: `held` of them, and `left` to train on.

    about: what was kept together where passages decided (passages.describe).
    """
    if own_sources:
        return f"The {held:,} held-out rows come from sources of their own."
    wanted = f"{settings.share:.3g} of the rows" if settings.share is not None else f"{settings.size:,} rows"
    led = f"{held:,} of {held + left:,} rows are held out (asked for: {wanted})"
    if settings.group_by:
        return (
            f"{led}, chosen by a hash of the column '{settings.group_by}': all rows of one value are on one side, "
            "and stay there when others are added."
        )
    if settings.stratify_by:
        return f"{led}, the same part of each value of the column '{settings.stratify_by}', by a hash of the prompt."
    if about:
        return f"{led}, chosen by a hash of the prompt, and of the passage where rows share one: {about}."
    stays = "a row stays where it is" if settings.share is not None else "one of them at most is displaced"
    return f"{led}, chosen by a hash of the prompt: {stays} when another is added."


def scramble(hashes: Hashes, salt: int) -> Hashes:
    """Other uniform hashes, uint64, that tell nothing of the first: SplitMix64's finaliser (Steele et al. 2014)."""
    mixed = hashes + np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def copies_of(digest: Hashes, weight: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """How often each row is used, int64 (n,): the weight's whole part, and once more for a fixed part of the rows.

    A weight of 2.3 gives each row twice and three tenths of them, chosen by their digests, a third time.
    """
    times = np.floor(weight)
    return (times + (scramble(digest, 1) / RANGE < weight - times)).astype(np.int64)


def _limit(share: float) -> np.uint64:
    return np.uint64(min(int(share * RANGE), 2**64 - 1))


def _fitting_groups(key: Hashes, size: int, column: str) -> Mask:
    """Groups in the order of their hashes, each that still fits into `size` rows."""
    held = _fitting(key, size)
    if not held.any():
        smallest = np.unique(key, return_counts=True)[1].min()
        raise UserError(
            f"data.heldout.size is {size:,}, but the smallest group of `group_by: {column}` has {smallest:,} rows"
        )
    return held


def _fitting(key: Hashes, size: int) -> Mask:
    _, group, counts = np.unique(key, return_inverse=True, return_counts=True)  # sorted: in the order of the hashes
    taken = np.zeros(len(counts), dtype=bool)
    waiting, room = np.flatnonzero(counts <= size), size
    while len(waiting):
        fitting = int(np.searchsorted(np.cumsum(counts[waiting]), room, side="right"))
        taken[waiting[:fitting]] = True
        room -= int(counts[waiting[:fitting]].sum())
        waiting = waiting[fitting + 1 :]  # the next one is too large for what is left
        waiting = waiting[counts[waiting] <= room]
    return taken[group]


def _stratified(share: float | None, size: int | None, prompt: Hashes, digest: Hashes, value: Hashes) -> Mask:
    """Of each value the rows with the lowest hashes: by `size` together, without one the `share` of each."""
    values, counts = np.unique(value, return_counts=True)
    if size is None:
        # Rounded up or down by the value's own hash: values of few rows get their part on the average, and how many
        # are held out of one value depends on no other.
        quota = np.floor((share or 0.0) * counts + scramble(values, 2) / RANGE).astype(np.int64)
    else:
        exact = size * counts / len(prompt)
        quota = np.floor(exact).astype(np.int64)
        # Largest remainders first.
        quota[np.lexsort((values, quota - exact))[: size - int(quota.sum())]] += 1
    order = np.lexsort((digest, prompt, value))
    starts = np.cumsum(counts) - counts
    place = np.arange(len(value)) - np.repeat(starts, counts)
    held = np.zeros(len(value), dtype=bool)
    held[order] = place < np.repeat(quota, counts)
    return held
