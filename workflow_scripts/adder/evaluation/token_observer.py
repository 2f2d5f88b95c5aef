"""A look at the tokens of transformers' generation while they are made."""

from collections.abc import Callable

import torch
from transformers import LogitsProcessor


class TokenObserver(LogitsProcessor):
    """Calls `see` with the ids so far, (replies, tokens), before each new token; changes nothing."""

    def __init__(self, see: Callable[[torch.Tensor], None]) -> None:
        self.see = see

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        self.see(input_ids)
        return scores
