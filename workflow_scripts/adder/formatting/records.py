"""What the stage "format" leaves for people and for the report: card.json, rejects.jsonl and the rows it dropped."""

from typing import Any, Literal, TypedDict

from adder.core.length_summary import LengthSummary
from adder.formatting.conversation import Message


class Reject(TypedDict):
    """A line of rejects.jsonl: a row that can't be used, why, and what it holds (as escaped JSON where it must be)."""

    source: str
    row: int
    reason: str
    data: Any


class Duplicate(TypedDict):
    """A line of duplicates.jsonl: a dropped row, and the id of the row that it repeats."""

    source: str
    row: int
    matches: str


class NearDuplicate(Duplicate):
    """A line of near_duplicates.jsonl; `similarity` is estimated, 0 to 1."""

    similarity: float
    dropped: bool


class Leak(Duplicate):
    """A line of leaked.jsonl: a training row that asks what the held-out or test row `matches` asks.

    share: of that row's words, those that the training row's prompt has too.
    """

    how: str
    share: float
    dropped: bool


class Counts(TypedDict):
    """How many rows were read, and how many are in each class; every row is in exactly one.

    tests: rows of protected test sets. leaked: training rows that a held-out or test row asks for too. left_out: by a
    weight below 1. undesired: rows that say of their own reply that it is not to be learnt.
    """

    rows_in: int
    train: int
    heldout: int
    tests: int
    duplicates: int
    near_duplicates: int
    leaked: int
    left_out: int
    undesired: int
    rejected: int


class ExampleRow(TypedDict):
    """A row to look at, shortened."""

    id: str
    text: str


class DuplicateExample(ExampleRow):
    """A dropped row and the id of the row that it repeats."""

    matches: str


class DuplicateFindings(TypedDict):
    """A few duplicates to look at; `Counts` has their number."""

    examples: list[DuplicateExample]


class NearDuplicateExample(TypedDict):
    """Two rows side by side, the later one first."""

    a: ExampleRow
    b: ExampleRow
    similarity: float


class NearDuplicateFindings(TypedDict):
    """What was looked for, how, and what was found."""

    action: Literal["report", "drop", "off"]
    method: str
    similarity: float
    found: int
    dropped: int
    examples: list[NearDuplicateExample]


class OverlapExample(TypedDict):
    """A training row and the held-out or test row whose prompt it has too."""

    train: ExampleRow
    heldout: ExampleRow
    share: float
    how: str


class OverlapFindings(TypedDict):
    """What was looked for, how, and what was found."""

    action: Literal["drop", "report", "off"]
    method: str
    looked_for: list[str]
    share: float
    found: int
    dropped: int
    examples: list[OverlapExample]


class Quality(TypedDict):
    """What was looked for among the rows, and a few examples of what was found."""

    duplicates: DuplicateFindings
    near_duplicates: NearDuplicateFindings
    overlap: OverlapFindings


class SampleMessage(TypedDict):
    """A plain text where a sample is one; `role` is "text"."""

    role: Literal["text"]
    content: str


class ConversationFigures(TypedDict):
    """What the training conversations are like.

    roles: {role: messages}. turns: {number of replies, as text: rows}. characters and first_words: {"prompt", "reply"};
    the words as [word, rows], most frequent first.
    """

    roles: dict[str, int]
    turns: dict[str, int]
    characters: dict[str, LengthSummary]
    first_words: dict[str, list[list[Any]]]


class Card(Counts, ConversationFigures):
    """card.json, the data card.

    train_rows: rows of train.parquet, repeats by a weight included. heldout_in_train: held-out rows that training rows
    asked too, before these were dropped. row_format: by source, null where none was recognised. columns: {column:
    [[value, rows], ...]} of columns with few values. split: how rows were held out, as a sentence. notes: what else a
    person should know of the rows that are used, a line each.
    """

    by_source: dict[str, Counts]
    train_rows: int
    repeats: int
    accepted: int
    heldout_in_train: int
    rejects_by_reason: dict[str, int]
    row_format: dict[str, str | None]
    samples: list[list[Message] | list[SampleMessage]]
    columns: dict[str, list[list[Any]]]
    quality: Quality
    split: str
    notes: list[str]
