"""Words that the sentences about lengths share."""

from typing import Literal

Truncate = Literal["drop", "right", "left", "split"]

# What becomes of examples that are longer than max_seq_length, by `lengths.truncate`.
LONGER: dict[Truncate, str] = {
    "drop": "are longer and dropped",
    "right": "are longer and lose their end",
    "left": "are longer and lose their beginning",
    "split": "are longer and split",
}


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 example" or "2,000 examples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
