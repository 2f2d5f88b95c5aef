"""One raw row to one conversation: the row formats that are recognised, and why a row can't be used.

A row format is one function with `@row_format`. Its name, the columns that it is known by and its docstring are all
that settings, detection, messages and documentation know of it. The order of turns is checked only for what no chat
template can mean; the template itself refuses what it can't render.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from adder.core.errors import UserError
from adder.data.field_template import nested
from adder.formatting.api_messages import ROLE_KEYS, is_calls, is_messages, is_other_part, is_said, text_of_parts
from adder.formatting.column_names import ASKS, canonical_names, is_lone_text, line_for, pair_readings
from adder.formatting.conversation import Conversation, Message
from adder.formatting.marks import JUDGEMENTS, ROW_MARKS, disapproves, doubtful, is_undesired, refuse_lists
from adder.formatting.messages import (
    BLANK,
    REASONING_KEYS,
    ROLES,
    assistant,
    check_order,
    is_message,
    read_messages,
    read_tools,
    text_of,
    user,
)
from adder.formatting.rejected import Rejected, Undesired, json_type
from adder.formatting.row_fields import RowFields, value_of
from adder.formatting.suggestions import lines_beside, lines_for
from adder.formatting.task_columns import (
    LONG_TEXT,
    TASK_COLUMNS,
    check_options,
    is_media,
    is_media_name,
    prompt_of,
    refuse_hidden_options,
    text_size,
    unread_names,
)
from adder.formatting.transcripts import is_transcript

Row = Mapping[str, Any]
Reader = Callable[[Row], list[Message] | str]
ColumnSets = Counter[tuple[str, ...]]  # which columns rows have, and how many rows have just these

SYSTEMS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction", "preamble")
TOOLS = ("tools", "functions", "available_tools", "toolConfig", "tool_config")
SHARED = (*SYSTEMS, *TOOLS)  # columns that any format but plain text may have
BESIDE = (*REASONING_KEYS, *SHARED)  # those that a prompt and its reply may have
_BESIDE = frozenset(BESIDE)
MEDIA = {"images", "image", "audios", "audio", "videos", "video"}
# Columns that hold what is asked.
PROMPTS = ("question", "instruction", "prompt", "messages", "conversations", "contents", "chat_history")
HISTORIES = ("history", "chat_history")
HISTORY = "is not a list of [instruction, output] pairs or of messages"
NO_MEDIA = "images, audio and video are not read"
PAIRS = {name for name, _, _ in ASKS.values()}  # formats of a prompt and its reply, which have many names
LAST = ("conversation", "contents", "chat_history", "text")  # looked for where there is no such pair
# Columns that are read as something else than text.
NO_TEXT = {"rejected", "messages", "conversations", "conversation", "contents", "text", "choices", "options"}.union(
    TOOLS, HISTORIES
)


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

    @cached_property
    def texts(self) -> frozenset[str]:
        """Columns that are read as text, and of which numbers and objects are written as JSON."""
        return frozenset(self.columns) - NO_TEXT


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
    `reasoning_content`, and on what is not to be learnt `weight: 0`, `train: false`, `loss: false`, `mask: true` or
    what else says that
    """
    return read_messages(row["messages"], "messages")


@row_format("sharegpt", "conversations", optional=SHARED)
def _from_sharegpt(row: Row) -> list[Message]:
    """`conversations`: a list of `{from, value}`, with `function_call` and `observation` turns"""
    return read_messages(row["conversations"], "conversations")


@row_format("alpaca", "instruction", "output", optional=(*HISTORIES, *TASK_COLUMNS, *BESIDE))
def _from_alpaca(row: Row) -> list[Message]:
    """`instruction`, `input`, `output`, `history`, `system`; `context`, `documents`, `choices` or `options` become part
    of the prompt
    """
    return [*_history(row), *_prompt(row, "instruction"), *_replies(row, "output")]


@row_format("prompt_completion", "prompt", "completion", optional=(*HISTORIES, *TASK_COLUMNS, *BESIDE))
def _from_prompt_completion(row: Row) -> list[Message]:
    """`prompt`, `completion`: texts or lists of messages; `input`, `context`, `choices` and the like become part of the
    prompt
    """
    return [*_history(row), *_prompt(row, "prompt"), *_replies(row, "completion")]


@row_format("question_answer", "question", "answer", optional=(*HISTORIES, *TASK_COLUMNS, *BESIDE))
def _from_question_answer(row: Row) -> list[Message]:
    """`question`, `answer`; `context`, `documents`, `choices` or `options` become part of the prompt, `reasoning` of
    the reply
    """
    return [*_history(row), *_prompt(row, "question"), *_replies(row, "answer")]


@row_format(
    "preference",
    "chosen",
    "rejected",
    optional=(*PROMPTS, "query", *TASK_COLUMNS, *HISTORIES, *BESIDE),
    unneeded=("rejected",),
    named_only="trains on the chosen reply of each row",
)
def _from_preference(row: Row) -> list[Message]:
    """`chosen` (and `rejected`): trains on `chosen`, only when you name it; the prompt stands in `prompt`, `question`,
    `instruction` with `input`, `messages` or `conversations`, or in `chosen` itself
    """
    chosen = row["chosen"]
    asked = _asked(row, chosen)
    if is_message(chosen):
        chosen = [chosen]
    if isinstance(chosen, list):
        replies = read_messages(chosen, "chosen")
        if any(message["role"] == "user" for message in replies):  # a whole conversation
            return replies
    elif not asked and isinstance(chosen, str) and "Human:" in chosen and "Assistant:" in chosen:
        return _from_transcript(chosen)
    else:
        replies = [_reply(row, "chosen")]
    if not asked:
        raise Rejected("chosen has no prompt", "a `chosen` that is only a reply needs a `prompt` column beside it")
    return [*asked, *replies]


@row_format("conversation", "conversation", optional=SHARED)
def _from_conversation(row: Row) -> list[Message]:
    """`conversation`: a list of `{human, assistant}`, or of messages"""
    return read_messages(row["conversation"], "conversation")


@row_format("contents", "contents", optional=SHARED)
def _from_contents(row: Row) -> list[Message]:
    """`contents`: a list of `{role, parts}` as Gemini and Vertex take it, with `systemInstruction` and `tools`"""
    return read_messages(row["contents"], "contents")


@row_format("chat_history", "chat_history", optional=SHARED)
def _from_chat_history(row: Row) -> list[Message]:
    """`chat_history`: a list of `{role, message}`, as Cohere takes it; beside a question and an answer it stands before
    them, as `history` does
    """
    return read_messages(row["chat_history"], "chat_history")


@row_format("text", "text")
def _from_text(row: Row) -> str:
    """`text`: continued pre-training, every token is learnt; only where nothing but ids, addresses, dates and scores
    stands beside it
    """
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


def _prompt(row: Row, column: str) -> list[Message]:
    """What is asked, with the columns that belong to it; in a list of messages it becomes part of the last one."""
    prompt = row[column]
    if is_message(prompt):
        prompt = [prompt]
    given = row.get("input") if column == "instruction" else None
    if isinstance(given, list) and is_messages(given):  # OpenAI's Responses, with `instructions`
        told = [] if prompt in BLANK else [{"role": "system", "content": prompt}]
        return read_messages([*told, *given], "input")
    if not isinstance(prompt, list) or not is_messages(prompt):
        return [user(prompt_of(row, column), column)]
    messages = read_messages(prompt, column)
    if messages[-1]["role"] == "user":
        last = messages[-1]["content"]
        messages[-1] = {**messages[-1], "content": prompt_of({**row, column: last}, column)}
    return messages


def _asked(row: Row, chosen: Any) -> list[Message]:
    """What the two replies of a preference answer, or nothing."""
    column = next((name for name in (*PROMPTS, "query") if row.get(name) not in BLANK), None)
    if column is None:
        return [*_history(row), user(prompt_of(row, "input"), "input")] if row.get("input") not in BLANK else []
    if column not in ("messages", "conversations"):
        return [*_history(row), *_prompt(row, column)]
    messages = read_messages(row[column], column)
    reply = chosen[-1] if isinstance(chosen, list) and chosen else chosen
    text = reply.get("content", reply.get("value")) if isinstance(reply, dict) else reply
    if messages[-1]["role"] == "assistant":
        if messages[-1]["content"] != text:
            raise Rejected("chosen has no prompt", f"{column} ends in a reply, which is not the chosen one")
        messages.pop()
    return messages


def _history(row: Row) -> list[Message]:
    """Earlier turns: pairs, as LLaMA-Factory writes them, or messages."""
    turns: list[Message] = []
    for name in HISTORIES:
        history = row.get(name)
        if history in BLANK:
            continue
        if isinstance(history, list) and is_messages(history):
            turns += read_messages(history, name)
            continue
        if not isinstance(history, list):
            made = f'; `prompt: "{{{name}}}\\n\\n{{…}}"` makes a text part of the prompt'
            raise Rejected(f"{name} {HISTORY}", f"found {json_type(history)}{made}")
        for number, pair in enumerate(history, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise Rejected(f"{name} {HISTORY}", f"entry {number} is none")
            turns += [user(pair[0], f"{name} {number}"), assistant(pair[1], f"{name} {number}")]
    return turns


def _replies(row: Row, column: str) -> list[Message]:
    """The reply in `column`: a content, a message, or a list of messages (TRL's conversational form)."""
    value = row[column]
    if is_message(value):
        value = [value]
    if isinstance(value, list) and is_messages(value):
        return read_messages(value, column)
    if isinstance(value, list) and any(map(is_other_part, value)):
        return read_messages([{"role": "assistant", "content": value}], column)
    calls = _calls_in(value, row) if isinstance(value, str | dict) else value
    if is_calls(calls):
        return read_messages([{"role": "assistant", "content": "", "tool_calls": calls}], column)
    return [_reply({**row, column: only_answer(value)} if isinstance(value, list | dict) else row, column)]


def _calls_in(value: str | dict[str, Any], row: Row) -> list[Any] | None:
    """The tool calls that a reply is, also as JSON text, where the row has tools to call; None for other replies."""
    if row.keys().isdisjoint(TOOLS) or not any(row.get(name) for name in TOOLS):
        return None
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return None
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            return None
    else:
        read = value
    calls = [read] if isinstance(read, dict) else read
    return calls if is_calls(calls) else None


def only_answer(value: Any) -> Any:
    """The text of a reply that stands in a list of possible ones, as data sets of questions on a text have it: a list
    of texts, of `{text, answer_start}`, or `{text: [...], answer_start: [...]}`. Anything else as it is.

    Raises Rejected where they differ.
    """
    if not isinstance(value, list | dict):
        return value
    texts, place = value, "0"
    if isinstance(value, dict):
        if not isinstance(value.get("text"), list) or not all(isinstance(one, list) for one in value.values()):
            return value
        texts, place = value["text"], "text.0"
    elif all(isinstance(one, dict) and isinstance(one.get("text"), str) and "type" not in one for one in value):
        if all(len(one) == 1 for one in value):  # parts of one text
            return value
        texts, place = [one["text"] for one in value], "0.text"
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    if len(set(texts)) > 1:
        found = f"{len(set(texts))}, the first is {texts[0][:40]!r}"
        lines = f'`completion: "{{….{place}}}"` takes that one, `completion: "{{…}}"` all as JSON'
        raise Rejected("several answers to choose from", f"{found}; {lines}")
    return texts[0] if texts else ""


def _reply(row: Row, column: str) -> Message:
    """The reply in `column`, with the reasoning beside it."""
    message = assistant(row[column], column)
    if row.keys().isdisjoint(_BESIDE):  # nearly all there are
        return message
    reasoning = next((name for name in REASONING_KEYS if row.get(name) not in BLANK), None)
    if reasoning is not None:
        message["reasoning_content"] = text_of(row[reasoning], reasoning)
    return message


def row_format_names() -> tuple[str, ...]:
    """What `row_format` may be set to."""
    return ("auto", *ROW_FORMATS)


class SourceFormat(NamedTuple):
    """How to read the rows of one source: the row format (None: unknown), the columns to rename ({canonical: actual}),
    whether the format was named by the user, who then asked for what preference data means, what else the settings
    say of the rows, and the names of values: {column: {value: name}}.
    """

    row_format: RowFormat | None
    columns: Mapping[str, str]
    named: bool
    fields: RowFields | None = None
    values: Mapping[str, Mapping[str, str]] | None = None

    @property
    def name(self) -> str | None:
        """The row format's name."""
        return self.row_format.name if self.row_format else None

    def actual(self, canonical: str) -> str:
        """What a column that the format knows is called in the source."""
        return self.columns.get(canonical, canonical)

    def canonical(self, name: str) -> str | None:
        """What the format knows a column of the source as; None where it doesn't read it."""
        if self.row_format is None or (self.fields and name in self.fields.columns()):
            return None
        known = next((canonical for canonical, actual in self.columns.items() if actual == name), name)
        if known not in self.row_format.columns or known in self._replaced():
            return None
        return known if self.columns.get(known, name) == name else None

    def own_columns(self) -> set[str]:
        """The actual names of the columns that the format reads."""
        read = set(self.row_format.columns if self.row_format else ()) - self._replaced()
        names = {self.actual(name) for name in read} | (self.fields.columns() if self.fields else set())
        return names | {column for name in names if "." in name for column in accumulate(name.split("."), _with_dot)}

    def reply_column(self) -> str:
        """The actual name of the column that holds the reply of a prompt."""
        made = self.fields.templates.get("completion") if self.fields else None
        if made is not None and made.fields:
            return made.fields[0].column
        return self.actual(self.row_format.known_by[1]) if self.row_format else ""

    def with_names(self, row: Row) -> Row:
        """The row with names in place of the values that have some. Raises Rejected for a value that has none."""
        if not self.values:
            return row
        named = {
            column: _named_value(row[column], column, names) for column, names in self.values.items() if column in row
        }
        return {**row, **named}

    def filled(self, row: Row) -> Row:
        """The row with what the templates make of it, and with our names for keys and roles of messages."""
        fields = self.fields
        if fields is None:
            return row
        made = fields.made(row)
        used = fields.columns() - ({self.actual(name) for name in self._known_by()} if not fields.makes_pair else set())
        within = {c: value_of(field, row) for c, name in self.columns.items() if (field := nested(name, row))}
        row = {**_rename({name: value for name, value in row.items() if name not in used}, self.columns), **within}
        replaced = self._replaced()
        kept = {name: value for name, value in row.items() if name not in replaced}
        if fields.message_keys or fields.roles:
            texts = (
                frozenset() if self.row_format is None else self.row_format.texts - {"prompt", "completion", "chosen"}
            )
            kept = {name: value if name in texts else fields.renamed(value) for name, value in kept.items()}
            made = {name: fields.renamed(value) for name, value in made.items()}
        return {**kept, **made}

    def _known_by(self) -> tuple[str, ...]:
        return self.row_format.known_by if self.row_format else ()

    def _replaced(self) -> set[str]:
        """Columns, as the format knows them, in whose place a template stands."""
        fields = self.fields
        if fields is None or not fields.templates:
            return set()
        replaced: set[str] = {*SYSTEMS} if "system" in fields.templates else set()
        if fields.makes_pair:
            replaced |= {"prompt", "completion"}
        if "prompt" in fields.given:
            replaced |= {*TASK_COLUMNS, "history"}
        return replaced


Vote = tuple[str, tuple[tuple[str, str], ...]]  # a candidate's format and columns


class Candidate(NamedTuple):
    """A way to read a row: the format, and {canonical: actual} of the columns that make it out."""

    row_format: RowFormat
    columns: Mapping[str, str]


def recognise(columns: Iterable[str]) -> RowFormat | None:
    """The row format that a set of column names tells, or None where there is none, or more than one."""
    found = candidates(columns)
    return found[0].row_format if len(found) == 1 else None


def candidates(columns: Iterable[str], named: Iterable[str] = ()) -> list[Candidate]:
    """The ways in which a row of these columns can be read. `named`: those that the user gave their names."""
    there = set(columns)
    forms = [form for form in ROW_FORMATS.values() if there.issuperset(form.known_by)]
    # What was said before may be named beside a question, too.
    meant = [form for form in forms if set(form.known_by) <= set(named) and form.name not in HISTORIES]
    if meant:
        return [Candidate(meant[0], {name: name for name in meant[0].known_by})]
    own = [form for form in forms if form.name not in PAIRS and form.name not in LAST and there.isdisjoint(form.unless)]
    own.sort(key=lambda form: form.named_only is None)  # preference rows may have their prompt in messages
    if own:
        several = own[0].name == "messages" and any(form.name == "sharegpt" for form in own)
        return [Candidate(form, {name: name for name in form.known_by}) for form in (own[:2] if several else own[:1])]
    pairs = pair_readings(there, named)
    if pairs:
        return [Candidate(ROW_FORMATS[name], mapping) for name, mapping in pairs]
    rest = [form for form in forms if form.name in LAST and (form.name != "text" or is_lone_text(frozenset(there)))]
    return [Candidate(form, {name: name for name in form.known_by}) for form in rest[:1]]


def source_format(
    source: str,
    row_format: str,
    columns: Mapping[str, str],
    column_sets: ColumnSets,
    protected: bool = False,
    fields: RowFields | None = None,
    values: Mapping[str, Mapping[str, str]] | None = None,
) -> SourceFormat:
    """Decide how to read a source, from the column sets of all its rows.

    row_format and columns as in the settings; with "auto" the format is the one that most rows have. protected: only
    what the rows ask is of interest. fields: what else the settings say of the rows. values: {column: {value: name}}.
    Raises UserError for an unknown format, for a column mapping that names what the format or the source doesn't have,
    for values of a column that isn't there, and where the rows can be read in more than one way.
    """
    there = sorted({column for columns_of_row in column_sets for column in columns_of_row})
    for canonical, actual in columns.items():
        if column_sets and actual not in there and nested(actual, there) is None:
            raise UserError(
                f"{source}: `columns: {{{canonical}: {actual}}}` names a column that no row has. The columns there: "
                f"{', '.join(there[:30]) or 'none'}"
            )
    for name in values or ():
        if column_sets and name not in there:
            raise UserError(
                f"{source}: `values` names the column '{name}', which no row has. The columns there: "
                f"{', '.join(there[:30]) or 'none'}"
            )
    named = row_format != "auto"
    if named and row_format not in ROW_FORMATS:
        raise UserError(f"{source}: there is no row format '{row_format}'; known are {', '.join(ROW_FORMATS)}")
    renamed = set(_rename(dict.fromkeys(there), columns))
    known = {name for form in ROW_FORMATS.values() for name in form.columns}
    other_case = canonical_names(renamed, known)
    if fields is not None and fields.makes_pair:
        named, form, mapping = True, ROW_FORMATS["prompt_completion"], {}
        other_case = {ours: theirs for ours, theirs in other_case.items() if ours in form.columns}
    elif named:
        form, mapping = ROW_FORMATS[row_format], _mapping_for(ROW_FORMATS[row_format], renamed, other_case)
    else:
        form, mapping = _most_frequent(source, column_sets, columns, other_case, protected)
    allowed = {*form.columns, *ROW_MARKS} if form else {*known, *ROW_MARKS}
    unknown = next((canonical for canonical in columns if canonical not in allowed | set(mapping.values())), None)
    if unknown is not None and column_sets:
        what = f"the row format {form.name} has" if form else "the row formats have"
        raise UserError(f"{source}: `columns` maps '{unknown}', but {what} only {', '.join(sorted(allowed))}")
    actual = {**other_case, **{canonical: other_case.get(name, name) for canonical, name in mapping.items()}}
    used = {name for canonical, name in actual.items() if canonical != name}
    given = {canonical: name for canonical, name in columns.items() if canonical not in used}
    found = {canonical: columns.get(name, name) for canonical, name in actual.items()}
    if fields is not None and "system" in fields.templates and form is not None and "system" not in form.columns:
        raise UserError(f"{source}: `system` is for conversations, and the row format {form.name} has none")
    return SourceFormat(form, {**given, **{c: name for c, name in found.items() if c != name}}, named, fields, values)


def _mapping_for(form: RowFormat, names: set[str], other_case: Mapping[str, str]) -> Mapping[str, str]:
    """What a named format's missing columns are called, where there is one way to tell."""
    if form.name not in PAIRS or names.issuperset(form.known_by):
        return {}
    pairs = [mapping for name, mapping in pair_readings(_rename(dict.fromkeys(names), other_case)) if name == form.name]
    return pairs[0] if len(pairs) == 1 else {}


def _most_frequent(
    source: str, column_sets: ColumnSets, columns: Mapping[str, str], other_case: Mapping[str, str], protected: bool
) -> tuple[RowFormat | None, Mapping[str, str]]:
    """The format that most rows have, and its columns' names. Raises UserError where most have more than one."""
    votes: Counter[tuple[Vote, ...]] = Counter()
    for columns_of_row, count in column_sets.items():
        renamed = _rename(_rename(dict.fromkeys(columns_of_row), columns), other_case)
        found = candidates(renamed, columns)
        if found:
            votes[tuple((one.row_format.name, tuple(one.columns.items())) for one in found)] += count
    order = list(ROW_FORMATS)
    if not votes:
        return None, {}
    best = min(votes, key=lambda found: (-votes[found], [order.index(name) for name, _ in found]))
    if best[1:] and protected:
        return None, {}
    if best[1:]:
        actual = {**columns, **other_case}
        lines = [line_for({c: actual.get(name, name) for c, name in mapping}) for _, mapping in best]
        raise UserError(
            f"{source}: its columns can be read in more than one way. Add to this source the line that is meant:"
            + "".join(f"\n  {line}" for line in lines)
        )
    name, mapping = best[0]
    return ROW_FORMATS[name], dict(mapping)


def to_conversation(row: Row, source: SourceFormat, system_prompt: str | None = None) -> Conversation:
    """Read one row and check it; add `system_prompt` where a conversation has no system message.

    Raises Rejected with a reason that a person can act on. Lone surrogates and numbers that JSON can't hold may still
    be in the conversation: whoever encodes it finds them (`messages.why_not_json`).
    """
    row = source.with_names(row)
    form, whole = source.row_format, row
    if form is None:
        raise _unrecognised(row, source)
    if source.fields is not None:
        row = source.filled(row)
    elif source.columns:
        row = _rename(row, source.columns)
    if form.name == "text" and not source.named and not is_lone_text(frozenset(row)):
        raise _unrecognised(row, source)
    mark = is_undesired(row)
    if mark is not None and not (form.name == "text" and mark in JUDGEMENTS):  # a text is no reply to judge
        raise Undesired("undesired", f"'{mark}' says that its reply is not to be learnt")
    refuse_lists(row)
    if not source.named and form.name != "text":
        _refuse_doubt(row, source, form)
    if form.named_only and not source.named:
        raise Rejected(
            f"{form.name} data ({' and '.join(form.known_by)})", f"`row_format: {form.name}` {form.named_only}"
        )
    for column in form.known_by:
        if column not in row and column not in form.unneeded:
            raise _unrecognised(row, source)
    _refuse_media(row, source)
    read = form.read(row)
    if isinstance(read, str):
        if not source.named and is_transcript(read):
            raise Rejected(
                "a text that is a conversation written out",
                "`row_format: text` learns all of it, what is asked included; `convert:` cuts it into {messages}",
            )
        return {"text": read}
    made = () if source.fields is None else source.fields.templates
    if "system" in made and row.get("system") and read[0]["role"] == "system":
        raise Rejected(
            "more than one system message",
            "the conversation has one, and so does `system` of the source; format.system_prompt is for rows without",
        )
    messages = _with_system(read, row, system_prompt)
    check_order(messages)
    if form.name in PAIRS:
        asked = messages[-2]["content"] if len(messages) > 1 else ""
        check_options(row, source.reply_column(), row[form.known_by[1]], asked, form.columns)
        if source.fields is not None:
            refuse_hidden_options(whole, row[form.known_by[1]], asked, source.own_columns())
        elif not source.named:
            _refuse_unread_text(row, form, asked, source)
    given = None if row.keys().isdisjoint(_BESIDE) else next((row[name] for name in TOOLS if row.get(name)), None)
    tools = read_tools(given) if given else None
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _refuse_media(row: Row, source: SourceFormat) -> None:
    """Raise Rejected for a row with an image, audio or video, unless its format was named and the column is no usual
    one: whoever named it saw which columns nothing reads.
    """
    for name in _media_names(tuple(row)):
        if name in MEDIA and row[name]:
            raise Rejected(NO_MEDIA, f"the column '{name}'")
        if not source.named and source.name != "text" and is_media(row[name]):
            named = f"; `row_format: {source.name}` leaves it out"
            raise Rejected(NO_MEDIA, f"the column '{name[:40]}'{named}")


@lru_cache(1024)
def _media_names(columns: tuple[str, ...]) -> list[str]:
    return [name for name in columns if name in MEDIA or is_media_name(name)]


def _refuse_unread_text(row: Row, form: RowFormat, asked: str, source: SourceFormat) -> None:
    """Raise Rejected where nothing reads a text that is long, longer than what is asked, or messages: the row may be
    about them.
    """
    for name in _unread(tuple(row), form.name):
        if is_said(row[name]):
            raise Rejected(
                f"nothing reads the column {name[:40]}, messages that the row may go on from",
                f"`columns: {{chat_history: {name[:40]}}}` has them stand before it, `row_format: {form.name}` leaves "
                "them out",
            )
        size = text_size(row[name])
        if size >= LONG_TEXT and size > len(asked):
            column = form.known_by[0]
            prompt = f"{{{name[:40]}}}\\n\\n{{{source.actual(column)}}}"
            raise Rejected(
                f"nothing reads the column {name[:40]}, a long text that the row may be about",
                f'`prompt: "{prompt}"` makes it part of the prompt, `row_format: {form.name}` leaves it out',
            )


@lru_cache(1024)
def _unread(columns: tuple[str, ...], row_format: str) -> list[str]:
    return unread_names(columns, ROW_FORMATS[row_format].columns)


def _refuse_doubt(row: Row, source: SourceFormat, form: RowFormat) -> None:
    """Raise Rejected where a column may say that the reply is not to be learnt, or something else."""
    key = doubtful(row)
    if key is None or key in form.columns:
        return
    actual = source.actual(key)
    mark = "mask" if disapproves(key) else "kto_tag"
    no = "true" if mark == "mask" else "0 or false"
    raise Rejected(
        f"the column {actual} may say which replies are not to be learnt, or something else",
        f"`columns: {{{mark}: {actual}}}` leaves out those where it is {no}, `row_format: {form.name}` doesn't read it",
    )


def to_prompt(row: Row, source: SourceFormat) -> Conversation:
    """What a row of a test set asks, as a conversation with an empty reply: such rows often have none, or none in text.

    Raises Rejected where there is no prompt either.
    """
    row = {name: value for name, value in row.items() if name not in ROW_MARKS}  # what is asked is asked in any case
    try:
        return to_conversation(row, source)
    except Rejected:
        with suppress(Rejected):  # of a reply's value that has no name
            row = source.with_names(row)
        row = _rename(row, source.columns) if source.fields is None else source.filled(row)
        column = next((name for name in PROMPTS if row.get(name)), None)
        if column is None:
            raise
    asked = _prompt(row, column) if isinstance(row[column], list) else [user(_asked_alone(row, column), column)]
    if asked[-1]["role"] != "assistant":
        asked.append({"role": "assistant", "content": ""})
    return {"messages": asked}


def _asked_alone(row: Row, column: str) -> str:
    """What a row of a test set asks; of an instruction with its input."""
    beside = {"input": row.get("input")} if column == "instruction" else {}
    return prompt_of({column: row[column], **beside}, column)


def _with_system(messages: list[Message], row: Row, system_prompt: str | None) -> list[Message]:
    """A column of SYSTEMS is the system message unless the conversation has one already; then comes `system_prompt`."""
    if messages[0]["role"] == "system":
        return messages
    given = [] if row.keys().isdisjoint(_BESIDE) else [name for name in SYSTEMS if row.get(name) not in (None, "")]
    if len({str(row[name]) for name in given}) > 1:
        raise Rejected("more than one system message", f"the columns {' and '.join(given)} differ")
    if not given and not system_prompt:
        return messages
    content = text_of(text_of_parts(row[given[0]]), given[0]) if given else system_prompt or ""
    return [{"role": "system", "content": content}, *messages]


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with each `actual` column of {canonical: actual} under its canonical name, `a.b` being b within a."""
    actual = set(columns.values())
    renamed = {name: value for name, value in row.items() if name not in actual}
    within = {canonical: field for canonical, name in columns.items() if (field := nested(name, row)) is not None}
    for field in within.values():
        renamed.pop(field.column, None)
    found = {canonical: row[name] for canonical, name in columns.items() if name in row}
    return renamed | found | {canonical: value_of(field, row) for canonical, field in within.items()}


def _named_value(value: Any, column: str, names: Mapping[str, str]) -> Any:
    """The name of a value, or of each in a list; nothing stays nothing."""
    if isinstance(value, list):
        return [_named_value(one, column, names) for one in value]
    if value in BLANK:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables with empty cells write whole numbers
    written = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if written not in names:
        known = ", ".join(names)
        raise Rejected("a value that `values` gives no name", f"{column} is {written[:40]!r}; it names {known[:200]}")
    return names[written]


def _with_dot(before: str, name: str) -> str:
    return f"{before}.{name}"


def _places_of_messages(row: Row) -> list[str]:
    """The columns that hold messages, and the keys within columns that do; just replies are none."""
    within = [
        (f"{name}.{key}", one) for name, value in row.items() if isinstance(value, dict) for key, one in value.items()
    ]
    return [place for place, value in (*row.items(), *within) if is_said(value) and any(map(_is_asked, value))]


def _is_asked(message: Mapping[str, Any]) -> bool:
    speaker = next((message[key] for key in ROLE_KEYS if key in message), None)
    return isinstance(speaker, str) and ROLES.get(speaker.strip().lower()) == "user"


def _unrecognised(row: Row, source: SourceFormat) -> Rejected:
    columns = ", ".join(sorted(row)[:8]) or "none"
    form = source.row_format
    if form is None:
        known = "; ".join(" + ".join(one.known_by) for one in ROW_FORMATS.values())
        one, other = (name[:40] for name in (*row, "question", "answer")[:2])
        places = _places_of_messages(row)
        lines = "" if places else lines_for(row)
        such = "" if lines else f', such as `prompt: "{{{one}}}"` and `completion: "{{{other}}}"`'
        hint = (
            f"columns {columns}{'; ' if lines else ''}{lines}; known are {known}. `columns:` maps other names to "
            f"them, `row_format:` names one; `prompt:` and `completion:` make them of columns{such}"
        )
        for place in places[:1]:
            choose = f" (and in {', '.join(places[1:4])}, of which one is to be chosen)" if places[1:] else ""
            apart = lines_beside(row, place)
            hint = (
                f"messages stand in {place}{choose}: `columns: {{messages: {place}}}` reads them where a reply ends "
                f"them, {apart} where it stands elsewhere; {hint}"
            )
        if "text" in row:
            hint += "; `row_format: text` trains on the text alone"
        if not all(column.isidentifier() for column in row):
            hint += (
                ". If these are the first row of a CSV file, name its columns by `header:`; if they are several, "
                "`delimiter:` says what separates them"
            )
        return Rejected("unknown row format", f"{hint}. `convert:` brings any row into one of them")
    known_by = " + ".join(form.known_by)
    if source.named:
        return Rejected(f"columns of the row format {form.name} are missing", f"it has {known_by}; found {columns}")
    return Rejected("columns unlike the rest of the source", f"columns {columns}; most rows there have {known_by}")
