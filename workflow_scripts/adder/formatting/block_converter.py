"""The hot path of the stage "format": a block of rows.jsonl to conversations, hashes, rejects and counts.

Runs in workers over blocks of whole lines. What comes back is bytes and arrays: a Python object a row would cost more
to hand over than to make.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import orjson

from adder.core.record_blocks import RecordBlock, parse_line, read_range
from adder.formatting import passages, replies, spool
from adder.formatting.conversation import Conversation, Message
from adder.formatting.messages import why_not_json
from adder.formatting.records import Reject
from adder.formatting.rejected import Rejected, Undesired
from adder.formatting.row_formats import MEDIA, ColumnSets, SourceFormat, to_conversation, to_prompt
from adder.formatting.row_notes import MOST_NOTES, notes_of, notes_of_calls
from adder.formatting.similarity.minhash import Signatures, Signer
from adder.formatting.similarity.words import folded
from adder.formatting.task_columns import is_media_name

BLOCK = 2 << 20  # bytes of rows.jsonl that one worker takes at once
TRAIN, HELDOUT, TEST, UNDECIDED = range(4)
SPLITS = {"train": TRAIN, "heldout": HELDOUT, "test": TEST, None: UNDECIDED}
MOST_COLUMN_SETS = 1_000  # of a source; of more, those count that have a column of their own
WORD_CHARACTERS = 24  # of a first word; JSON without spaces would be one long word
CATEGORIES = 50  # a column of more different values is not categorical
CATEGORY_CHARACTERS = 80
NO_SYSTEM = bytes(8)
SEPARATOR = b"\xff"  # stands between pieces that are hashed: no UTF-8 has this byte
TAGS = {role: role.encode() for role in ("system", "user", "assistant", "tool")}
# ASCII in lower case, whatever str.split takes for white space as a space.
FOLDED = bytes(32 if chr(code).isspace() else code for code in range(128)).lower() + bytes(range(128, 256))


class Survey(NamedTuple):
    """What a first look finds: how many rows each source has, and of which column sets (tuples of names)."""

    rows: Counter[str]
    column_sets: dict[str, ColumnSets]

    def add(self, other: "Survey") -> None:
        """Take what was found in another block."""
        self.rows.update(other.rows)
        for source, sets in other.column_sets.items():
            known = self.column_sets.setdefault(source, Counter())
            names = {column for columns in known for column in columns}
            for columns, count in sets.items():
                if columns in known or len(known) < MOST_COLUMN_SETS or not names.issuperset(columns):
                    known[columns] += count


class ConversionRules(NamedTuple):
    """What each worker knows: how to read each source, in order; the column of group_by or stratify_by; which columns
    of each source may be categorical; whether to sign rows for near-duplicates.
    """

    formats: dict[str, SourceFormat]
    system_prompt: str | None
    value_column: str | None
    categorical: dict[str, list[str]]
    sign: bool


Categories = Counter[Any]  # the values of a categorical column, and how often each occurs


class RejectKind(NamedTuple):
    """How many rows are rejected for one kind of reason, and the first of them."""

    rows: int
    first: Reject


class Rest(TypedDict):
    """What is known of a block's rows beside the accepted ones, as JSON; they are all of one source.

    kinds: [rows, the first of them] of each kind of rejection. undesired: rows that say of their reply that it isn't to
    be learnt. notes: [what is to be known, rows]. categories: [value, rows] of each column that may be categorical,
    None where it isn't.
    """

    kinds: dict[str, tuple[int, Reject]]
    rejected: int
    undesired: int
    notes: list[tuple[str, int]]
    categories: dict[str, list[tuple[Any, int]] | None]


class ConvertedBlock(NamedTuple):
    """One block's accepted rows, as a part of the spool and what became of the others.

    Rows are numbered from the block's first one, so that it may stand anywhere. part's columns: row, int64; digest, of
    the normalised conversation, prompt, of what is asked, normalised, and system, of the system message, normalised, or
    0, all uint64; reply, replies.reply_key; lines, passages.LINES uint64 as bytes, of long lines that may be a
    passage's; value of ConversionRules.value_column, uint64, 0 where it is missing; signature, uint8 (rows,
    minhash.PERMUTATIONS), where rows are signed. rejects: lines of rejects.jsonl.
    """

    part: bytes
    accepted: int
    rejects: bytes
    rest: Rest


def blocks(path: Path) -> list[tuple[int, int]]:
    """Where to cut a file into blocks of whole lines: (start, end) in bytes."""
    found, size, start = [], path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            file.seek(min(start + BLOCK, size))
            file.readline()
            found.append((start, file.tell()))
            start = file.tell()
    return found


def surveyor(path: Path) -> Callable[[tuple[int, int]], Survey]:
    """The function that surveys one block of the file."""
    return partial(_survey, path)


def converter(path: Path, rules: ConversionRules) -> Callable[[RecordBlock], ConvertedBlock]:
    """The function that converts one block of the file."""
    return _Converter(path, rules).convert


def _survey(path: Path, block: tuple[int, int]) -> Survey:
    rows: Counter[str] = Counter()
    column_sets: dict[str, ColumnSets] = {}
    for line in _lines(path, block):
        record = parse_line(line)
        source = record["source"]
        rows[source] += 1
        data = record.get("data")
        if isinstance(data, dict):
            columns = tuple(data)
            known = column_sets.get(source)
            if known is None:
                known = column_sets[source] = Counter()
            known[columns] += 1
    return Survey(rows, column_sets)


class _Converter:
    """Converts blocks; one in each worker."""

    def __init__(self, path: Path, rules: ConversionRules) -> None:
        self.path, self.rules = path, rules
        self.signer = Signer() if rules.sign else None

    def convert(self, block: RecordBlock) -> ConvertedBlock:
        """Convert one block of rows.jsonl."""
        rules, rows, rejects = self.rules, _AcceptedRows(), _Rejects()
        texts: list[str] = []
        lines: list[bytes] = []
        source = rules.formats[block.source]
        categorical: dict[str, list[Any]] = {name: [] for name in rules.categorical[block.source]}
        undesired = 0
        notes: Counter[str] = Counter()
        for line in _lines(self.path, (block.start, block.end)):
            record = parse_line(line)
            record["row"] -= block.first_row
            try:
                conversation, encoded = self._read(record, source)
            except Undesired:
                undesired += 1
                continue
            except Rejected as reason:
                rejects.add(record, reason)
                continue
            rows.add(conversation, encoded)
            rows.numbers.append(record["row"])
            data = record["data"]
            for note in (*notes_of(data, source), *notes_of_calls(conversation)):
                if len(notes) < MOST_NOTES or note in notes:
                    notes[note] += 1
            if rules.value_column:
                rows.values.append(hash_value(data.get(rules.value_column)))
            lines.append(passages.passages_of(conversation))
            rows.replies.append(replies.reply_key(conversation))
            if rules.sign:
                texts.append(full_text(conversation))
            for column, values in categorical.items():
                values.append(data.get(column))
        found = {column: count_values(values) for column, values in categorical.items()} if rows.numbers else {}
        return ConvertedBlock(
            part=rows.pack(lines, self.signer.sign(texts) if self.signer else None, rules.value_column is not None),
            accepted=len(rows.numbers),
            rejects=b"".join(rejects.lines),
            rest={
                "kinds": {name: (kind.rows, kind.first) for name, kind in rejects.kinds.items()},
                "rejected": rejects.rows,
                "undesired": undesired,
                "notes": list(notes.items()),
                "categories": {
                    name: None if counts is None else list(counts.items()) for name, counts in found.items()
                },
            },
        )

    def _read(self, record: dict[str, Any], source: SourceFormat) -> tuple[Conversation, bytes]:
        """The conversation, and its JSON."""
        if "error" in record:
            raise Rejected("unreadable row", str(record["error"]), counted_as=record.get("kind"))
        data = record["data"]
        if not isinstance(data, dict):
            raise Rejected("unreadable row", "not an object with named columns")
        if "unfit" in record:
            media = () if source.named else filter(is_media_name, record["unfit"])
            needed = {*source.own_columns(), *MEDIA, *media, self.rules.value_column}
            _refuse_unfit(record["unfit"], needed)
        if record["split"] == "test":
            conversation = to_prompt(data, source)
        else:
            conversation = to_conversation(data, source, self.rules.system_prompt)
        try:
            return conversation, orjson.dumps(conversation)
        except TypeError as error:
            raise why_not_json(conversation, error) from None


def _refuse_unfit(unfit: dict[str, str], needed: set[str | None]) -> None:
    """Raise Rejected where a column is needed whose value could not be read; others don't matter."""
    for column, type in unfit.items():
        if column in needed:
            raise Rejected(f"the column '{column}' can't be read", f"its values are of the type {type}")


class _AcceptedRows:
    """The accepted rows of one block as columns."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.conversations: list[bytes] = []
        self.figures: list[int] = []  # of all rows, one after the other: spool.FIGURES
        self.prompt_words: list[bytes] = []
        self.reply_words: list[bytes] = []
        self.digests: list[bytes] = []
        self.prompts: list[bytes] = []
        self.systems: list[bytes] = []
        self.values: list[bytes] = []
        self.replies: list[bytes] = []

    def pack(self, lines: list[bytes], signatures: Signatures | None, with_values: bool) -> bytes:
        """The part of the spool that holds them."""
        figures = np.array(self.figures, dtype=np.int32).reshape(-1, len(spool.FIGURES))
        prompt_words, reply_words = (
            [_cut_word(word) for word in words] for words in (self.prompt_words, self.reply_words)
        )
        columns: dict[str, npt.NDArray[Any]] = {
            "row": np.array(self.numbers, dtype=np.int64),
            "digest": np.frombuffer(b"".join(self.digests), dtype="<u8"),
            "prompt": np.frombuffer(b"".join(self.prompts), dtype="<u8"),
            "system": np.frombuffer(b"".join(self.systems), dtype="<u8"),
            "reply": replies.joined(self.replies),
            "lines": passages.joined(lines).view(np.uint8),
        }
        if with_values:
            columns["value"] = np.frombuffer(b"".join(self.values), dtype="<u8")
        if signatures is not None:
            columns["signature"] = signatures
        return spool.pack(self.conversations, figures, prompt_words, reply_words, columns)

    def add(self, conversation: Conversation, encoded: bytes) -> None:
        """Take one conversation and its JSON; all its figures and hashes are made here, in one pass."""
        self.conversations.append(encoded)
        text = conversation.get("text")
        if text is not None:
            self._add_text(text)
            return
        systems = users = replies = results = prompt_characters = reply_characters = first = last = 0
        prompt_word = reply_word = b""
        pieces: list[bytes] = []  # role, normalised text, and what else there is, for each message
        for message in conversation.get("messages", []):
            role, content = message["role"], message["content"]
            text = normalise(content)
            last = len(pieces)
            pieces += (TAGS[role], text)
            if role == "assistant":
                replies += 1
                reply_characters += len(content)
                if replies == 1:
                    reply_word = text.partition(b" ")[0] or _called(message)
            else:
                prompt_characters += len(content)
                if role == "user":
                    users += 1
                    if users == 1:
                        prompt_word = text.partition(b" ")[0]
                elif role == "tool":
                    results += 1
                else:
                    systems += 1
                    first = 2
            if len(message) > 2:
                pieces.append(_extras(message))
                reply_characters += len(message.get("reasoning_content", ""))
                if role == "system":
                    first = 3
        # Of rows that ask nothing none is like another.
        prompt = pieces[first:last]
        if "tools" in conversation:
            pieces.append(orjson.dumps(conversation["tools"], option=orjson.OPT_SORT_KEYS))
        digest = _hash(SEPARATOR.join(pieces))
        self.digests.append(digest)
        self.prompts.append(_hash(SEPARATOR.join(prompt)) if prompt else digest)
        self.systems.append(_hash(pieces[1]) if first else NO_SYSTEM)
        self.figures += (systems, users, replies, results, prompt_characters, reply_characters)
        self.prompt_words.append(prompt_word)
        self.reply_words.append(reply_word)

    def _add_text(self, text: str) -> None:
        plain = normalise(text)
        digest = _hash(b"text" + SEPARATOR + plain)
        self.digests.append(digest)
        self.prompts.append(digest)
        self.systems.append(NO_SYSTEM)
        self.figures += (0, 0, 0, 0, spool.NO_PROMPT, len(text))
        self.prompt_words.append(b"")
        self.reply_words.append(plain.partition(b" ")[0])


class _Rejects:
    """The rejected rows of one block."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.kinds: dict[str, RejectKind] = {}
        self.rows = 0

    def add(self, record: dict[str, Any], reason: Rejected) -> None:
        """Take a row as rows.jsonl has it, and why it can't be used."""
        data = record.get("data", record.get("raw"))
        reject: Reject = {
            "source": record["source"],
            "row": record["row"],
            "reason": _encodable(str(reason)),
            "data": data,
        }
        try:
            line = orjson.dumps(reject, option=orjson.OPT_SORT_KEYS)
        except TypeError:  # lone surrogates, large numbers, deep nesting: as escaped JSON
            reject["data"] = data if isinstance(data, str) else _dumped(data)
            reject["data"] = _encodable(reject["data"])
            line = orjson.dumps(reject, option=orjson.OPT_SORT_KEYS)
        self.lines += (line, b"\n")
        self.rows += 1
        known = self.kinds.get(reason.kind, RejectKind(0, reject))
        self.kinds[reason.kind] = known._replace(rows=known.rows + 1)


def place_rejects(lines: bytes, first_row: int) -> bytes:
    """Lines of rejects.jsonl whose rows are numbered from 0 on, for a block whose first row has this number."""
    placed = []
    for line in lines.splitlines(keepends=True):
        start = line.rindex(b',"row":') + 7  # what follows it is a text, where no quotation mark stands by itself
        end = line.index(b",", start)
        placed.append(b"%b%d%b" % (line[:start], int(line[start:end]) + first_row, line[end:]))
    return b"".join(placed)


def full_text(conversation: Conversation) -> str:
    """All contents of a conversation: what near-duplicates are found by."""
    if "text" in conversation:
        return conversation["text"]
    return "\n".join([message["content"] for message in conversation.get("messages", [])])


def prompt_text(conversation: Conversation, with_system: bool = False) -> str:
    """What the user says, or a plain text as a whole: what overlap with held-out rows is found by."""
    if "text" in conversation:
        return conversation["text"]
    messages = conversation.get("messages", [])
    roles = ("system", "user") if with_system else ("user",)
    return "\n".join([message["content"] for message in messages if message["role"] in roles])


def normalise(text: str) -> bytes:
    """The text folded (see `words.folded`) and with single spaces, as UTF-8."""
    if not text.isascii():
        return " ".join(folded(text).split()).encode()
    plain = text.encode().translate(FOLDED).strip()  # several times faster than to make a string of each word
    while b"  " in plain:
        plain = plain.replace(b"  ", b" ")
    return plain


def hash_value(value: Any) -> bytes:
    """Hash of a column's value (8 bytes), 0 for none. 1, 1.0 and "1" are one value: CSV and Parquet differ in that."""
    if value is None or value == "" or value != value:  # NaN is a missing number
        return bytes(8)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        return bytes(8)
    return _hash(text.encode("utf-8", "backslashreplace"))


def count_values(values: list[Any]) -> Categories | None:
    """How often each value of a column occurs, None where it isn't categorical."""
    try:
        counts = Counter(values)
    except TypeError:
        return None
    del counts[None], counts[""]
    return counts if is_categorical(counts) else None


def is_categorical(counts: Categories) -> bool:
    """Whether a column has few short values of one type (text, true/false, integer), as a small table can show."""
    if len(counts) > CATEGORIES:
        return False
    types = set(map(type, counts))
    return not counts or (
        len(types) == 1
        and types <= {str, bool, int}
        and all(len(text) <= CATEGORY_CHARACTERS and is_unicode(text) for text in map(str, counts))
    )


def is_unicode(text: str) -> bool:
    """Whether a text is free of half surrogate pairs, which UTF-8 can't hold."""
    return _encodable(text) == text


def _lines(path: Path, block: tuple[int, int]) -> Iterator[bytes]:
    return filter(None, read_range(path, block).split(b"\n"))


def _extras(message: Message) -> bytes:
    """What a message has beside role and content, normalised. Identities of calls are left out: they are drawn anew
    for each copy of a conversation.
    """
    rest: dict[str, Any] = {
        key: value for key, value in message.items() if key not in ("role", "content", "tool_call_id")
    }
    if "tool_calls" in message:
        rest["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    return normalise(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS).decode())


def _called(message: Message) -> bytes:
    calls = message.get("tool_calls")
    return calls[0]["function"]["name"].encode() if calls else b""


def _cut_word(word: bytes) -> str:
    return word[: 4 * WORD_CHARACTERS].decode("utf-8", "ignore")[:WORD_CHARACTERS]


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _dumped(data: Any) -> str:
    try:
        return json.dumps(data)
    except RecursionError:
        return "(nested too deep to show)"
