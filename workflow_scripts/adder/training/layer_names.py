"""Names of layers in a sentence."""

from collections.abc import Sequence

LISTED = 20


def listed(layers: Sequence[str]) -> str:
    """The first LISTED names, and how many more there are."""
    rest = len(layers) - LISTED
    return ", ".join(layers[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
