"""What the stage "tokenize" leaves for later stages and the report: tokenize.json."""

from typing import Any, TypedDict

from adder.core.length_summary import LengthSummary
from adder.tokenization.stage import LossOn


class Token(TypedDict):
    """A token as the vocabulary writes it, and its id."""

    token: str
    id: int


class ReplyEnd(Token):
    """A token that replies end in, and how many of the training replies do."""

    replies: int


class BosToken(TypedDict):
    """The beginning-of-text token, null where there is none, and whether conversations begin with it."""

    token: str | None
    id: int | None
    written: bool


class SplitCounts(TypedDict):
    """Of one split: examples, their tokens, those of them that carry loss, and examples encoded in pieces.

    split: conversations that became several examples, since the template writes earlier replies otherwise than the
    model would have to. unmatched: replies that carry no loss, for in the held-out part conversations aren't split, and
    the first message of a conversation answers no prompt.
    """

    examples: int
    split: int
    unmatched: int
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

    template: "own", "file", or the name of the template that was used. template_variables: as set. generation_blocks:
    whether the template marks replies by itself. end_of_turn: what generation stops on. reply_ends: all tokens that
    replies end in, most frequent first; generation stops on each. rejected: the first of them, all are counted.
    """

    template: str
    template_variables: dict[str, Any]
    loss_on: LossOn
    generation_blocks: bool
    end_of_turn: Token
    reply_ends: list[ReplyEnd]
    bos: BosToken
    pad: Token
    counts: dict[str, SplitCounts]
    reply_tokens: dict[str, LengthSummary]
    examples: list[TokenizedExample]
    rejected: list[RejectedConversation]
    rejected_count: int
    rejected_by_reason: dict[str, int]
    warnings: list[str]
