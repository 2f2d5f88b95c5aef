"""What a person should know of rows that are used: keys that nothing reads, values that became text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

from adder.data.field_template import nested
from adder.formatting import api_messages
from adder.formatting.column_names import line_for
from adder.formatting.conversation import Conversation, Message
from adder.formatting.marks import ROW_MARKS, SPANS, is_mark, verdict
from adder.formatting.messages import BLANK, MESSAGE_KEYS, is_message
from adder.formatting.rejected import json_type
from adder.formatting.row_fields import value_of
from adder.formatting.row_formats import TOOLS, ColumnSets, RowFormat, SourceFormat, only_answer
from adder.formatting.task_columns import CONTEXTS, TASK_COLUMNS, document_text

Row = Mapping[str, Any]
Notes = Counter[tuple[str, str]]  # (source, what of it): rows
TEXTS = (str, list, type(None))
AS_JSON = (bool, int, float, dict)
NO_MESSAGES = frozenset((*TASK_COLUMNS, *TOOLS))  # lists of objects in these aren't messages
CALL_IN_TEXT = re.compile(
    r"""<\|?(tool_?call|function_?call)|\[TOOL_CALLS\]|\{\s*"name"\s*:[^{}]*"(arguments|parameters)"\s*:"""
)
TEMPLATE_MARKS = ("<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "### Human:", "### Response:")
MARKED = "messages have the marks of a chat template in their text, and the model's own are put around them"
CALLS_IN_TEXT = "replies call tools in their text, which is learnt as it stands, whatever the model's own way is"
MOST_NOTED = 12  # columns that one line names
MOST_NOTES = 200  # of a block; keys that are data would be without end


def notes_of(row: Row, source: SourceFormat) -> Iterator[str]:
    """What is to be known of one row that is used, each thing once."""
    form = source.row_format
    if form is None:
        return
    row = source.with_names(row)
    fields = source.fields
    found: set[str] = set() if fields is None else set(fields.notes(row))
    places = [field for name in source.columns.values() if (field := nested(name, row))]
    within = [(field.written, value_of(field, row)) for field in places]
    for name, value in (*row.items(), *within):
        if isinstance(value, str) or value is None:  # nearly all there are
            continue
        canonical = source.canonical(name)
        if canonical is None or any(name == field.column for field in places):
            continue
        value = api_messages.text_of_parts(value if fields is None else fields.renamed(value))
        may_be_messages = canonical not in NO_MESSAGES
        if may_be_messages and isinstance(value, list) and value and isinstance(value[0], dict):
            found.update(_of_messages(value) if api_messages.is_messages(value) else _of_parts(value))
        elif may_be_messages and is_message(value):
            found.update(_of_messages([value]))
        elif canonical in form.texts and isinstance(value, AS_JSON) and not _has_text(value, canonical, form, row):
            found.add(f"'{name}' is {json_type(value)}, written as JSON")
    for key in () if row.keys().isdisjoint(_ROW_MARKS) else row.keys() & _ROW_MARKS:
        if (
            row[key] not in BLANK
            and verdict(row, key) is None
            and not (fields and key in fields.columns())
            and key not in source.columns.values()
        ):
            found.add(f"the column '{key}' is neither true nor false, so nothing reads it")
    yield from found


def _has_text(value: Any, canonical: str, form: RowFormat, row: Row) -> bool:
    """Whether of an object or a list its own texts are read: of documents, of possible answers, and of a tool call."""
    if canonical in CONTEXTS:
        return not document_text(value, canonical).startswith("{")
    if canonical != form.known_by[-1]:
        return False
    return isinstance(only_answer(value), str) or (
        api_messages.is_calls([value]) and any(row.get(name) for name in TOOLS)
    )


def notes_of_calls(conversation: Conversation) -> list[str]:
    """What is to be known of a conversation's text and tool calls: of tools that aren't there, and without results."""
    messages = conversation.get("messages", [])
    called = [(place, message["tool_calls"]) for place, message in enumerate(messages) if "tool_calls" in message]
    found: list[str] = [] if called or not any(map(_calls_in_text, messages)) else [CALLS_IN_TEXT]
    if any(mark in message["content"] for message in messages for mark in TEMPLATE_MARKS):
        found.append(MARKED)
    if not called:
        return found
    tools = {tool["function"]["name"] for tool in conversation.get("tools", [])}
    names = {call["function"]["name"] for _, calls in called for call in calls}
    if not tools:
        found.append("tools are called, and no column defines any")
    elif names - tools:
        found.append(f"the tool '{_shown(min(names - tools))}' is called, which the row's tools don't define")
    for place, calls in called:
        results = [message["role"] for message in takewhile(_is_result, messages[place + 1 :])]
        if len(results) < len(calls) and place + 1 < len(messages):
            found.append("a tool call has no result before the next turn")
            break
    return found


def _calls_in_text(message: Message) -> bool:
    """Whether a reply calls a tool in its text, as some data sets write calls for one family of models."""
    content = message["content"]
    return message["role"] == "assistant" and '"name"' in content and CALL_IN_TEXT.search(content) is not None


def _is_result(message: Message) -> bool:
    return message["role"] == "tool"


def unread_columns(source: SourceFormat, column_sets: ColumnSets, also_read: Iterable[str]) -> dict[str, int]:
    """The columns that nothing reads, and how many rows have each, most frequent first.

    also_read: columns that are read whatever the format.
    """
    read = {*source.own_columns(), *source.columns.values(), *ROW_MARKS, *also_read}
    found: Counter[str] = Counter()
    for columns, rows in column_sets.items():
        found.update(dict.fromkeys(set(columns) - read, rows))
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def column_notes(source: SourceFormat, column_sets: ColumnSets, also_read: Iterable[str]) -> list[str]:
    """Which columns are read under other names, which become part of the prompt, and which nothing reads; a line each.

    also_read: columns that are read whatever the format.
    """
    form = source.row_format
    if form is None:
        return []
    there = {column for columns in column_sets for column in columns}
    notes: list[str] = []
    if source.columns:
        notes.append(f"read as if it had the line `{_shown_line(source)}`")
    notes += (
        [] if source.fields is None else [f"`{name}` is {text}" for name, text in source.fields.described().items()]
    )
    read = source.own_columns() - (source.fields.columns() if source.fields else set())
    renamed = {name for actual in source.columns.values() for name in (actual, actual.split(".")[0])}
    task = [
        actual
        for name in TASK_COLUMNS
        if name in form.optional and (actual := source.actual(name)) in there and actual in read - renamed
    ]
    if task:
        notes.append(f"part of the prompt: {', '.join(task)}")
    unread = unread_columns(source, column_sets, also_read)
    if unread:
        notes.append(f"nothing reads the columns {listed(unread)}")
    return notes


def _shown_line(source: SourceFormat) -> str:
    return line_for({_shown(canonical): _shown(actual) for canonical, actual in source.columns.items()})


def listed(columns: Mapping[str, int]) -> str:
    """Columns and their rows, as a line lists them."""
    names = [f"{_shown(name)} ({rows:,} rows)" for name, rows in columns.items()]
    more = [f"{len(names) - MOST_NOTED:,} more"] if len(names) > MOST_NOTED else []
    return ", ".join([*names[:MOST_NOTED], *more])


_ROW_MARKS = frozenset(ROW_MARKS)
_ASKED = ("train", "training", "trainable", "loss")  # on a message that is no reply, who writes this means to learn it


def _shown(name: str) -> str:
    """A name shortened, and without half surrogate pairs."""
    return name[:40].encode("utf-8", "backslashreplace").decode()


def _of_messages(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        if not isinstance(message, dict) or (len(message) == 2 and api_messages.is_plain(message)):
            continue
        key = api_messages.content_key(message)
        content = None if key is None else message[key]
        if not isinstance(content, TEXTS) and not isinstance(message.get("type"), str):
            yield f"a message's content is {json_type(content)}, written as JSON"
        if isinstance(content, list):
            yield from _of_parts(content)
        if len(message) > 2:
            yield from _of_keys(message, key)


def _of_keys(message: Mapping[str, Any], content_key: str | None) -> Iterator[str]:
    """What nothing reads of a message's keys. content_key: the one that has what it says."""
    is_item = isinstance(message.get("type"), str)
    known = MESSAGE_KEYS | (api_messages.ITEM_KEYS if is_item else {"author", content_key})
    for key in message.keys() - known:
        if (
            message[key] not in BLANK
            and message[key] != {}
            and not (isinstance(key, str) and is_mark(key, message[key]))
        ):
            yield f"nothing reads the key '{_shown(key)}' of messages"
    if message.get("role", message.get("from")) in ("user", "human", "system", "tool"):
        for key in _ASKED:
            if message.get(key) is True:
                yield f"'{key}: true' of messages that are no replies is not read: only replies are learnt"
        for key in SPANS:
            if message.get(key):
                yield f"'{key}' of messages that are no replies is not read: only replies are learnt"


def _of_parts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if not isinstance(part, dict):
            continue
        inner = next(iter(part.values())) if len(part) == 1 else None  # Gemini's and Bedrock's
        part = inner if isinstance(inner, dict) else part
        for key in part.keys() - api_messages.PART_KEYS:
            if part[key] in (*BLANK, {}, False, "success") or (isinstance(key, str) and is_mark(key, part[key])):
                continue
            yield f"nothing reads the key '{_shown(key)}' of a message's parts"
