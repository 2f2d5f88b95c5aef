"""The figures of the data card that tell what the conversations are like: roles, turns, lengths, words, columns."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from adder.core.length_summary import summarise
from adder.formatting.block_converter import Categories, is_categorical
from adder.formatting.conversation import Conversation, Message
from adder.formatting.records import ConversationFigures, SampleMessage
from adder.formatting.spool import NO_PROMPT, Spool

Integers = npt.NDArray[np.int64]

ROLES = ("system", "user", "assistant", "tool")
FIRST_WORDS = 10
MOST_WORDS = 100_000  # different first words that are counted exactly; with more, the rarest ones are forgotten
COLUMNS, COLUMN_VALUES = 6, 12  # columns shown, and values of each
ROWS_A_VALUE = 2  # a column of which each row has its own value is not categorical, however few the rows
COUNTED_AT_ONCE = 1 << 16  # rows
SAMPLES = 3
EXAMPLES = 5
EXAMPLE_CHARACTERS = 600


class TrainFigures:
    """Figures over the training rows, read off the spool's columns one part after the other."""

    def __init__(self) -> None:
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.lengths: dict[str, list[npt.NDArray[np.int32]]] = {"prompt": [], "reply": []}
        self.words: dict[str, Counter[str]] = {"prompt": Counter(), "reply": Counter()}
        self._words: dict[str, list[pa.Array]] = {"prompt": [], "reply": []}  # of parts that wait to be counted
        self._rows = 0  # of these

    def add(self, part: pa.RecordBatch) -> None:
        """Take some training rows (columns of spool.SCHEMA)."""
        for role in ROLES:
            self.roles[role] += int(part.column(role).to_numpy().sum(dtype=np.int64))
        counted = part.column("assistant").value_counts()
        self.turns.update({pair["values"].as_py(): pair["counts"].as_py() for pair in counted})
        for side in ("prompt", "reply"):
            lengths = part.column(f"{side}_characters").to_numpy()
            self.lengths[side].append(lengths[lengths != NO_PROMPT])
            self._words[side].append(part.column(f"{side}_word"))
        self._rows += len(part)
        if self._rows >= COUNTED_AT_ONCE:
            self._count_words()

    def _count_words(self) -> None:
        """Count the words of the parts that wait."""
        for side, waiting in self._words.items():
            words = pa.chunked_array(waiting, type=pa.string()).value_counts()
            self.words[side].update(dict(zip(words.field(0).to_pylist(), words.field(1).to_pylist(), strict=True)))
            del self.words[side][""]
            if len(self.words[side]) > 2 * MOST_WORDS:
                self.words[side] = Counter(dict(self.words[side].most_common(MOST_WORDS)))
            waiting.clear()
        self._rows = 0

    def result(self) -> ConversationFigures:
        """The figures as card.json has them. Plain texts have neither turns nor prompts."""
        self._count_words()
        return {
            "roles": {role: count for role, count in self.roles.items() if count},
            "turns": {str(turns): self.turns[turns] for turns in sorted(self.turns) if turns},
            "characters": {
                side: summarise(np.concatenate(parts) if parts else []) for side, parts in self.lengths.items()
            },
            "first_words": {
                side: [list(pair) for pair in _most_common(words, FIRST_WORDS)] for side, words in self.words.items()
            },
        }


class CategoricalColumns:
    """Values of the columns that may be categorical, over all accepted rows; None where a column turned out not to."""

    def __init__(self) -> None:
        self.counts: dict[str, Categories | None] = {}

    def add(self, found: dict[str, Categories | None]) -> None:
        """Take one block's counts. A column that isn't categorical in one block is none."""
        for column, counts in found.items():
            known = self.counts.setdefault(column, Counter())
            # Equal values of other types (1 and true) would be counted as one.
            if known is None or counts is None or len(_types(known) | _types(counts)) > 1:
                self.counts[column] = None
                continue
            known.update(counts)
            if not is_categorical(known):
                self.counts[column] = None

    def result(self) -> dict[str, list[list[Any]]]:
        """{column: [[value, count], ...]} of the columns that most rows have, most frequent values first."""
        categorical = {
            column: counts
            for column, counts in self.counts.items()
            if counts is not None and len(counts) >= 2 and counts.total() >= ROWS_A_VALUE * len(counts)
        }
        chosen = sorted(categorical, key=lambda column: (-categorical[column].total(), column))[:COLUMNS]
        return {column: [list(pair) for pair in _most_common(categorical[column], COLUMN_VALUES)] for column in chosen}


def samples(spool: Spool, rows: Integers, digest: npt.NDArray[np.uint64]) -> list[list[Message] | list[SampleMessage]]:
    """The messages of the training rows with the lowest digests; a plain text is one message of the role "text"."""
    lowest = rows[np.argsort(digest[rows], kind="stable")[:SAMPLES]]
    return [_sample(orjson.loads(text)) for text in spool.conversations(lowest)]


def example_texts(spool: Spool, rows: Integers) -> list[str]:
    """Some rows as text to look at, shortened: each message on its lines, led by its role where there are several."""
    return [_readable(orjson.loads(text)) for text in spool.conversations(rows)]


def _sample(conversation: Conversation) -> list[Message] | list[SampleMessage]:
    text = conversation.get("text")
    return conversation.get("messages", []) if text is None else [{"role": "text", "content": text}]


def _readable(conversation: Conversation) -> str:
    text = conversation.get("text")
    if text is None:
        text = "\n".join(
            f"{message['role']}: {message['content'] or orjson.dumps(message.get('tool_calls')).decode()}"
            for message in conversation.get("messages", [])
        )
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"


def _types(counts: Categories) -> set[type]:
    """The type of the values, as there is one where a column is categorical; none where there are no values."""
    return {type(value) for value in counts}


def _most_common(counts: Counter[Any], most: int) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], str(pair[0])))[:most]
