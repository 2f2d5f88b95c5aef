"""One raw row to one conversation: the row formats that are recognised, and why a row can't be used.

A row format is one function with `@row_format`. Its name, the columns that it is known by and its docstring are all
that settings, detection, messages and documentation know of it. The order of turns is checked only for what no chat
template can mean; the template itself refuses what it can't render.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from adder.core.errors import UserError
from adder.formatting.conversation import Conversation, Message
from adder.formatting.messages import (
    Rejected,
    assistant,
    check_order,
    json_type,
    read_messages,
    read_tools,
    text_of,
    user,
)

Row = Mapping[str, Any]
Reader = Callable[[Row], list[Message] | str]
ColumnSets = Counter[tuple[str, ...]]  # which columns rows have, and how many rows have just these

SHARED = ("system", "tools", "functions")  # columns that any format but plain text may have
REASONING = "reasoning_content"
MEDIA = {"images", "image", "audios", "audio", "videos", "video"}
# A text beside one of these is something to predict the label from, not a text to learn.
LABELS = ("label", "labels", "target")
PROMPTS = ("question", "instruction", "prompt", "messages", "conversations")  # columns that hold what is asked
HISTORY = "history is not a list of [instruction, output] pairs"


@dataclass(frozen=True)
class RowFormat:
    """A row format.

    known_by: columns that a row of this format has; `recognise` goes by them. optional: columns that are read where
    they stand. unneeded: those of `known_by` that a row may lack where the format is named. unless: columns beside
    which it is not recognised. named_only: rows are used only where `row_format` names the format; the text says what
    for. meaning: what its columns hold, in Markdown. read: from a row to messages, or to a plain text.
    """

    name: str
    known_by: tuple[str, ...]
    optional: tuple[str, ...]
    unneeded: tuple[str, ...]
    unless: tuple[str, ...]
    named_only: str | None
    meaning: str
    read: Reader

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return self.known_by + self.optional


# The first whose columns a row has wins.
ROW_FORMATS: dict[str, RowFormat] = {}


def row_format(
    name: str,
    *known_by: str,
    optional: tuple[str, ...] = (),
    unneeded: tuple[str, ...] = (),
    unless: tuple[str, ...] = (),
    named_only: str | None = None,
) -> Callable[[Reader], Reader]:
    """Register the decorated function as the reader of a row format; its docstring is the format's meaning."""

    def register(read: Reader) -> Reader:
        meaning = " ".join((read.__doc__ or "").split())
        ROW_FORMATS[name] = RowFormat(name, known_by, optional, unneeded, unless, named_only, meaning, read)
        return read

    return register


@row_format("messages", "messages", optional=SHARED)
def _from_messages(row: Row) -> list[Message]:
    """`messages`: a list of `{role, content}`: text or typed parts, tool calls and results with a `tools` column,
    `reasoning_content`, `weight: 0` or `train: false` on what is not to be learnt
    """
    return read_messages(row["messages"], "messages")


@row_format("sharegpt", "conversations", optional=SHARED)
def _from_sharegpt(row: Row) -> list[Message]:
    """`conversations`: a list of `{from, value}`, with `function_call` and `observation` turns"""
    return read_messages(row["conversations"], "conversations")


@row_format("alpaca", "instruction", "output", optional=("input", "history", REASONING, *SHARED))
def _from_alpaca(row: Row) -> list[Message]:
    """`instruction`, `input`, `output`, `history`, `system`"""
    parts = [row["instruction"], row.get("input")]
    task = "\n\n".join(text_of(part, name) for part, name in zip(parts, ("instruction", "input"), strict=True) if part)
    turns: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Rejected(HISTORY, f"found {json_type(history)}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected(HISTORY, f"entry {number} is none")
        turns += [user(pair[0], f"history {number}"), assistant(pair[1], f"history {number}")]
    return [*turns, user(task, "instruction"), _reply(row, "output")]


@row_format("prompt_completion", "prompt", "completion", optional=(REASONING, *SHARED))
def _from_prompt_completion(row: Row) -> list[Message]:
    """`prompt`, `completion`: texts or lists of messages"""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):  # TRL's conversational form
        replies = read_messages(completion, "completion")
    else:
        replies = [_reply(row, "completion")]
    return [*_prompt(prompt, "prompt"), *replies]


@row_format("question_answer", "question", "answer", optional=(REASONING, *SHARED))
def _from_question_answer(row: Row) -> list[Message]:
    """`question`, `answer`"""
    return [user(row["question"], "question"), _reply(row, "answer")]


@row_format(
    "preference",
    "chosen",
    "rejected",
    optional=("prompt", REASONING, *SHARED),
    unneeded=("rejected",),
    named_only="trains on the chosen reply of each row",
)
def _from_preference(row: Row) -> list[Message]:
    """`chosen` (and `rejected`): trains on `chosen`, only when you name it"""
    # A reply to `prompt`, or a whole conversation (with or without the prompt beside it).
    chosen, prompt = row["chosen"], row.get("prompt")
    if isinstance(chosen, list):
        messages = read_messages(chosen, "chosen")
        if prompt in (None, "", []) or messages[0]["role"] != "assistant":
            return messages
        return [*_prompt(prompt, "prompt"), *messages]
    if prompt not in (None, "", []):
        return [*_prompt(prompt, "prompt"), _reply(row, "chosen")]
    if isinstance(chosen, str) and "Human:" in chosen and "Assistant:" in chosen:
        return _from_transcript(chosen)
    raise Rejected("chosen has no prompt", "a `chosen` that is text needs a `prompt` column beside it")


@row_format("text", "text", unless=LABELS)
def _from_text(row: Row) -> str:
    """`text`: continued pre-training, every token is learnt"""
    return text_of(row["text"], "text")


def _from_transcript(text: str) -> list[Message]:
    """ "\\n\\nHuman: … \\n\\nAssistant: …", as Anthropic's hh-rlhf writes a conversation."""
    turns = ("\n\n" + text.strip()).split("\n\nHuman:")
    if turns[0].strip():
        raise Rejected("chosen has no prompt", "a transcript must start with `Human:`")
    messages: list[Message] = []
    for turn in turns[1:]:
        asked, *replies = turn.split("\n\nAssistant:")
        messages.append(user(asked.strip(), "chosen, Human"))
        messages += [assistant(reply.strip(), "chosen, Assistant") for reply in replies]
    return messages


def _prompt(prompt: Any, column: str) -> list[Message]:
    return read_messages(prompt, column) if isinstance(prompt, list) else [user(prompt, column)]


def _reply(row: Row, column: str) -> Message:
    """The reply in `column`, with the reasoning beside it."""
    message = assistant(row[column], column)
    reasoning = row.get(REASONING)
    if reasoning not in (None, ""):
        message["reasoning_content"] = text_of(reasoning, REASONING)
    return message


def row_format_names() -> tuple[str, ...]:
    """What `row_format` may be set to."""
    return ("auto", *ROW_FORMATS)


class SourceFormat(NamedTuple):
    """How to read the rows of one source: the row format (None: unknown), the columns to rename ({canonical: actual}),
    and whether the format was named by the user, who then asked for what preference data means.
    """

    row_format: RowFormat | None
    columns: Mapping[str, str]
    named: bool

    @property
    def name(self) -> str | None:
        """The row format's name."""
        return self.row_format.name if self.row_format else None

    def own_columns(self) -> set[str]:
        """The actual names of the columns that the format reads."""
        canonical = self.row_format.columns if self.row_format else ()
        return {self.columns.get(name, name) for name in canonical}


def recognise(columns: Iterable[str]) -> RowFormat | None:
    """The row format that a set of column names tells, or None."""
    there = set(columns)
    form = next((form for form in ROW_FORMATS.values() if there.issuperset(form.known_by)), None)
    return form if form is None or there.isdisjoint(form.unless) else None


def source_format(source: str, row_format: str, columns: Mapping[str, str], column_sets: ColumnSets) -> SourceFormat:
    """Decide how to read a source, from the column sets of all its rows.

    row_format and columns as in the settings; with "auto" the format is the one that most rows have. Raises UserError
    for an unknown format and for a column mapping that names what the format or the source doesn't have.
    """
    there = sorted({column for columns_of_row in column_sets for column in columns_of_row})
    for canonical, actual in columns.items():
        if column_sets and actual not in there:
            raise UserError(
                f"{source}: `columns: {{{canonical}: {actual}}}` names a column that no row has. The columns there: "
                f"{', '.join(there[:30]) or 'none'}"
            )
    named = row_format != "auto"
    if named and row_format not in ROW_FORMATS:
        raise UserError(f"{source}: there is no row format '{row_format}'; known are {', '.join(ROW_FORMATS)}")
    form = ROW_FORMATS[row_format] if named else _most_frequent(column_sets, columns)
    allowed = form.columns if form else {name for known in ROW_FORMATS.values() for name in known.columns}
    unknown = next((canonical for canonical in columns if canonical not in allowed), None)
    if unknown is not None and column_sets:
        what = f"the row format {form.name} has" if form else "the row formats have"
        raise UserError(f"{source}: `columns` maps '{unknown}', but {what} only {', '.join(sorted(allowed))}")
    return SourceFormat(form, columns, named)


def _most_frequent(column_sets: ColumnSets, columns: Mapping[str, str]) -> RowFormat | None:
    votes: Counter[str] = Counter()
    for columns_of_row, count in column_sets.items():
        form = recognise(_rename(dict.fromkeys(columns_of_row), columns))
        if form is not None:
            votes[form.name] += count
    order = list(ROW_FORMATS)
    name = min(votes, key=lambda name: (-votes[name], order.index(name)), default=None)
    return None if name is None else ROW_FORMATS[name]


def to_conversation(row: Row, source: SourceFormat, system_prompt: str | None = None) -> Conversation:
    """Read one row and check it; add `system_prompt` where a conversation has no system message.

    Raises Rejected with a reason that a person can act on. Lone surrogates and numbers that JSON can't hold may still
    be in the conversation: whoever encodes it finds them (`messages.why_not_json`).
    """
    if source.columns:
        row = _rename(row, source.columns)
    form = source.row_format
    if form is None:
        raise _unrecognised(row, source)
    if form.named_only and not source.named:
        raise Rejected(
            f"{form.name} data ({' and '.join(form.known_by)})", f"`row_format: {form.name}` {form.named_only}"
        )
    for column in form.known_by:
        if column not in row and column not in form.unneeded:
            raise _unrecognised(row, source)
    if not MEDIA.isdisjoint(row):
        column = next((column for column in sorted(MEDIA) if row.get(column)), None)
        if column:
            raise Rejected("images, audio and video are not read", f"the column '{column}'")
    read = form.read(row)
    if isinstance(read, str):
        return {"text": read}
    messages = _with_system(read, row, system_prompt)
    check_order(messages)
    given = row.get("tools") or row.get("functions")
    tools = read_tools(given) if given else None
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def to_prompt(row: Row, source: SourceFormat) -> Conversation:
    """What a row of a test set asks, as a conversation with an empty reply: such rows often have none, or none in text.

    Raises Rejected where there is no prompt either.
    """
    try:
        return to_conversation(row, source)
    except Rejected:
        row = _rename(row, source.columns)
        column = next((name for name in PROMPTS if row.get(name)), None)
        if column is None:
            raise
    asked = _prompt(row[column], column)
    if isinstance(row.get("input"), str) and column == "instruction":
        asked[0]["content"] += f"\n\n{row['input']}"
    if asked[-1]["role"] != "assistant":
        asked.append({"role": "assistant", "content": ""})
    return {"messages": asked}


def _with_system(messages: list[Message], row: Row, system_prompt: str | None) -> list[Message]:
    """A `system` column is the system message unless the conversation has one already; then comes `system_prompt`."""
    system = row.get("system")
    if messages[0]["role"] == "system" or (system in (None, "") and not system_prompt):
        return messages
    content = (system_prompt or "") if system in (None, "") else text_of(system, "system")
    return [{"role": "system", "content": content}, *messages]


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with each `actual` column of {canonical: actual} under its canonical name."""
    actual = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in actual}
    return kept | {canonical: row[name] for canonical, name in columns.items() if name in row}


def _unrecognised(row: Row, source: SourceFormat) -> Rejected:
    columns = ", ".join(sorted(row)[:8]) or "none"
    form = source.row_format
    if form is None:
        known = "; ".join(" + ".join(one.known_by) for one in ROW_FORMATS.values())
        hint = f"columns {columns}; known are {known}. `columns:` maps other names to them, `row_format:` names one"
        if "text" in row:
            hint += "; `row_format: text` trains on the text alone"
        if not all(column.isidentifier() for column in row):
            hint += ". If these are the first row of a CSV file, name its columns by `header:`"
        return Rejected("unknown row format", f"{hint}. `convert:` brings any row into one of them")
    known_by = " + ".join(form.known_by)
    if source.named:
        return Rejected(f"columns of the row format {form.name} are missing", f"it has {known_by}; found {columns}")
    return Rejected("columns unlike the rest of the source", f"columns {columns}; most rows there have {known_by}")
