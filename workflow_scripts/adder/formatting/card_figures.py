"""The figures of the data card that tell what the conversations are like: roles, turns, lengths, words, columns."""

from collections import Counter

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from adder.core.length_summary import summarise
from adder.formatting.block_converter import UNTELLING, tells
from adder.formatting.spool import NO_PROMPT, Spool

ROLES = ("system", "user", "assistant", "tool")
FIRST_WORDS = 10
MOST_WORDS = 100_000  # different first words that are counted exactly; with more, the rarest ones are forgotten
COLUMNS, COLUMN_VALUES = 6, 12  # columns shown, and values of each
ROWS_A_VALUE = 2  # a column of which each row has its own value tells nothing, however few the rows
SAMPLES = 3
EXAMPLES = 5
EXAMPLE_CHARACTERS = 600


class TrainFigures:
    """Figures over the training rows, read off the spool's columns one part after the other."""

    def __init__(self):
        self.roles: Counter = Counter()
        self.turns: Counter = Counter()
        self.lengths: dict[str, list[np.ndarray]] = {"prompt": [], "reply": []}
        self.words: dict[str, Counter] = {"prompt": Counter(), "reply": Counter()}

    def add(self, part: pa.RecordBatch) -> None:
        """Take some training rows (columns of spool.SCHEMA)."""
        for role in ROLES:
            self.roles[role] += pc.sum(part.column(role), min_count=0).as_py()
        counted = pc.value_counts(part.column("assistant"))
        self.turns.update({pair["values"].as_py(): pair["counts"].as_py() for pair in counted})
        for side in ("prompt", "reply"):
            lengths = part.column(f"{side}_characters").to_numpy()
            self.lengths[side].append(lengths[lengths != NO_PROMPT])
            words = pc.value_counts(part.column(f"{side}_word"))
            self.words[side].update(dict(zip(words.field(0).to_pylist(), words.field(1).to_pylist(), strict=True)))
            del self.words[side][""]
            if len(self.words[side]) > 2 * MOST_WORDS:
                self.words[side] = Counter(dict(self.words[side].most_common(MOST_WORDS)))

    def result(self) -> dict:
        """{roles, turns, characters, first_words} as card.json has them. Plain texts have neither turns nor prompts."""
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


class Columns:
    """Values of the columns that may tell something, over all accepted rows."""

    def __init__(self):
        self.counts: dict[str, Counter | None] = {}

    def add(self, found: dict[str, Counter | None]) -> None:
        """Take one block's counts. A column that is untelling in one block stays so."""
        for column, counts in found.items():
            known = self.counts.setdefault(column, Counter())
            if known is UNTELLING or counts is UNTELLING:
                self.counts[column] = UNTELLING
                continue
            # Equal values of other types (1 and true) would be counted as one.
            if known and counts and type(next(iter(known))) is not type(next(iter(counts))):
                self.counts[column] = UNTELLING
                continue
            known.update(counts)
            if not tells(known):
                self.counts[column] = UNTELLING

    def result(self) -> dict[str, list]:
        """{column: [[value, count], ...]} of the columns that most rows have, most frequent values first."""
        telling = {
            column: counts
            for column, counts in self.counts.items()
            if counts is not UNTELLING and len(counts) >= 2 and counts.total() >= ROWS_A_VALUE * len(counts)
        }
        chosen = sorted(telling, key=lambda column: (-telling[column].total(), column))[:COLUMNS]
        return {column: [list(pair) for pair in _most_common(telling[column], COLUMN_VALUES)] for column in chosen}


def samples(spool: Spool, rows: np.ndarray, digest: np.ndarray) -> list[list[dict]]:
    """The messages of the training rows with the lowest digests; a plain text is one message of the role "text"."""
    lowest = rows[np.argsort(digest[rows], kind="stable")[:SAMPLES]]
    read = [orjson.loads(text) for text in spool.conversations(lowest)]
    return [one["messages"] if "messages" in one else [{"role": "text", "content": one["text"]}] for one in read]


def example_texts(spool: Spool, rows: np.ndarray) -> list[str]:
    """Some rows as text to look at, shortened: each message on its lines, led by its role where there are several."""
    return [_readable(orjson.loads(text)) for text in spool.conversations(rows)]


def _readable(conversation: dict) -> str:
    if "text" in conversation:
        text = conversation["text"]
    else:
        text = "\n".join(
            f"{message['role']}: {message['content'] or orjson.dumps(message.get('tool_calls')).decode()}"
            for message in conversation["messages"]
        )
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"


def _most_common(counts: Counter, most: int) -> list[tuple]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], str(pair[0])))[:most]
