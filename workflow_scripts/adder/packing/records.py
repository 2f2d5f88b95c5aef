"""What the stage "lengths" leaves for later stages and the report: lengths.json."""

from typing import Literal, NotRequired, TypedDict

from adder.core.length_summary import LengthSummary


class LengthCandidate(TypedDict):
    """What one max_seq_length would mean. Shares and wastes are 0 to 1, wastes of the positions.

    padding_waste: of batches padded to their longest example. attention_share: of the model's arithmetic; absent where
    its config.json doesn't tell.
    """

    max_seq_length: int
    examples_truncated: int
    share_whole: float
    labelled_tokens_lost: int
    labelled_share_lost: float
    padding_waste: float
    packs: int
    packing_waste: float
    examples_per_pack: float
    attention_share: NotRequired[float]


class LengthChoice(TypedDict):
    """The chosen max_seq_length, why, and the candidates."""

    value: int
    reason: str
    alternatives: list[LengthCandidate]


class PackingLayout(TypedDict):
    """One way to lay out the examples, and the share of its positions that stay empty."""

    layout: str
    packing: bool
    positions: int
    waste: float


class PackingChoice(TypedDict):
    """Whether examples are packed, why, and what each layout would waste."""

    value: bool
    reason: str
    alternatives: list[PackingLayout]


class Histogram(TypedDict):
    """Lengths in bins of one width: `counts[i]` examples of at least edges[i] and fewer than edges[i + 1] tokens."""

    edges: list[int]
    counts: list[int]


class Truncation(TypedDict):
    """What became of examples that are too long; share: of the loss-bearing tokens, those that are lost."""

    mode: Literal["drop", "right", "left", "split"]
    examples: int
    tokens_lost: int
    labelled_lost: int
    share: float
    sentence: str


class LengthsRecord(TypedDict):
    """lengths.json.

    tokens: of the examples, before any is cut. available: examples before max_examples. examples: pieces trained on.
    fill: share of all positions that hold a token. dropped_ids: the first of the dropped examples.
    """

    tokens: LengthSummary
    histogram: Histogram
    context: int
    max_seq_length: LengthChoice
    packing: PackingChoice
    available: int
    examples: int
    packs: int
    examples_per_pack: float
    fill: float
    total_tokens: int
    labelled_tokens: int
    truncation: Truncation
    dropped: int
    dropped_ids: list[str]
