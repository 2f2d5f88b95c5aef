"""The control tokens of a vocabulary, wherever their text stands."""

import re

from transformers import PreTrainedTokenizerFast

from adder.tokenization.chat_template import Span, UnusableRow, special_tokens


class ControlTokens:
    """Finds control tokens in texts.

    ids: text -> id. texts: longest first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = special_tokens(tokenizer)
        self.texts = tuple(sorted(self.ids, key=len, reverse=True))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self._beginnings = {text[:2] for text in self.texts}

    def spans(self, text: str) -> list[Span]:
        """Where the control tokens of a text stand, in order."""
        return [match.span() for match in self.pattern.finditer(text)]

    def is_in(self, text: str) -> bool:
        """Whether a text holds a control token."""
        return any(beginning in text for beginning in self._beginnings) and self.pattern.search(text) is not None

    def refuse_in(self, text: str, who: str) -> None:
        """Raise UnusableRow if a text that someone wrote holds a control token."""
        if self.is_in(text):
            raise UnusableRow(
                f"{who} holds {self.pattern.findall(text)[0]}, which the tokenizer reads as a control token",
                "a text holds what the tokenizer reads as a control token",
            )
