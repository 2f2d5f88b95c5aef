"""What the stage "tokenize" leaves for later stages and the report: tokenize.json."""

from typing import TypedDict

from adder.core.length_summary import LengthSummary
from adder.tokenization.stage import LossOn


class Token(TypedDict):
    """A token as the vocabulary writes it, and its id."""

    token: str
    id: int


class BosToken(TypedDict):
    """The beginning-of-text token, null where there is none, and whether conversations begin with it."""

    token: str | None
    id: int | None
    written: bool


class SplitCounts(TypedDict):
    """Of one split: examples, their tokens, those of them that carry loss, and examples encoded in pieces."""

    examples: int
    tokens: int
    labelled: int
    cut: int


class TokenizedExample(TypedDict):
    """An example token by token; `loss` is 1 where a token carries loss, else 0."""

    id: str
    source: str
    tokens: list[str]
    loss: list[int]


class RejectedConversation(TypedDict):
    """A conversation that can't be used with this template and tokenizer, and why."""

    id: str
    split: str
    reason: str


class TokenizeRecord(TypedDict):
    """tokenize.json. `counts` and `reply_tokens` are by split, "train" and "heldout".

    template: "own", "file", or the name of the template that was used. generation_blocks: whether the template marks
    replies by itself. end_of_turn: what generation stops on. rejected: the first of them, all are counted.
    """

    template: str
    loss_on: LossOn
    generation_blocks: bool
    end_of_turn: Token
    bos: BosToken
    pad: Token
    counts: dict[str, SplitCounts]
    reply_tokens: dict[str, LengthSummary]
    examples: list[TokenizedExample]
    rejected: list[RejectedConversation]
    rejected_count: int
    rejected_by_reason: dict[str, int]
    warnings: list[str]
