"""Whether to put several examples into one sequence: what packs, and padding instead, would leave empty."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from adder.core.choice import Choice
from adder.packing.best_fit_decreasing import batch_padded_positions, best_fit_decreasing, waste
from adder.packing.records import PackingLayout
from adder.packing.wording import counted


def choose_packing(
    lengths: npt.NDArray[np.int64],
    max_seq_length: int,
    effective_batch_size: int,
    requested: Literal["auto"] | bool = "auto",
) -> Choice[bool, PackingLayout]:
    """Choose whether to pack: when packs waste fewer positions than real batches padded to their longest example do.

    `lengths`: (n,) tokens an example, none above `max_seq_length`. The batches are shuffled ones of
    `effective_batch_size`.
    """
    tokens = int(lengths.sum())
    packs = best_fit_decreasing(lengths, max_seq_length)
    layouts = {
        "packed": len(packs) * max_seq_length,
        "batches padded to their longest": batch_padded_positions(lengths, effective_batch_size),
        "padded to max_seq_length": len(lengths) * max_seq_length,
    }
    alternatives: list[PackingLayout] = [
        {"layout": name, "packing": name == "packed", "positions": positions, "waste": waste(tokens, positions)}
        for name, positions in layouts.items()
    ]
    packed, batched, padded = (row["waste"] for row in alternatives)
    compared = (
        f"{counted(len(lengths), 'example')} fit into {counted(len(packs), 'sequence')} of {max_seq_length} tokens "
        f"with {packed:.1%} of the positions empty; one by one, batches of {effective_batch_size} padded to their "
        f"longest example would leave {batched:.1%} empty, padding each to {max_seq_length} tokens {padded:.1%}"
    )
    if requested != "auto":
        reason = f"{'on' if requested else 'off'}, as set in the configuration: {compared}"
        return Choice(requested, reason, alternatives)
    if len(packs) == len(lengths):
        return Choice(False, f"off: no two examples fit into one sequence of {max_seq_length} tokens", alternatives)
    value = packed < batched
    return Choice(value, f"{'on' if value else 'off'}: {compared}", alternatives)
