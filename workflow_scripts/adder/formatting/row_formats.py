"""One raw row to one conversation: the row formats that are recognised, and why a row can't be used.

A conversation is {"messages": [...], "tools"?: [...]}, or {"text": ...} for plain text. A message is {"role": "system",
"user", "assistant" or "tool", "content": text} and, where they apply, `reasoning_content`, `tool_calls` ([{"type":
"function", "id"?, "function": {"name", "arguments": object}}]), `tool_call_id`, `name`, and `train: false` on a reply
that is not to be trained on. The order of turns is checked only for what no chat template can mean; the template itself
refuses what it can't render.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from adder.core.errors import UserError
from adder.formatting.messages import (
    Rejected,
    assistant,
    check_order,
    kind_of,
    read_messages,
    read_tools,
    text_of,
    user,
)

SHARED = ("system", "tools", "functions")  # columns that any format but plain text may have
REASONING = "reasoning_content"
MEDIA = {"images", "image", "audios", "audio", "videos", "video"}
# A text beside one of these is something to predict the label from, not a text to learn.
LABELS = ("label", "labels", "target")
PROMPTS = ("question", "instruction", "prompt", "messages", "conversations")  # columns that hold what is asked
HISTORY = "history is not a list of [instruction, output] pairs"


def _from_messages(row: dict) -> list[dict]:
    return read_messages(row["messages"], "messages")


def _from_sharegpt(row: dict) -> list[dict]:
    return read_messages(row["conversations"], "conversations")


def _from_alpaca(row: dict) -> list[dict]:
    parts = [row["instruction"], row.get("input")]
    task = "\n\n".join(text_of(part, name) for part, name in zip(parts, ("instruction", "input"), strict=True) if part)
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Rejected(HISTORY, f"found {kind_of(history)}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected(HISTORY, f"entry {number} is none")
        turns += [user(pair[0], f"history {number}"), assistant(pair[1], f"history {number}")]
    return [*turns, user(task, "instruction"), _reply(row, "output")]


def _from_prompt_completion(row: dict) -> list[dict]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):  # TRL's conversational form
        replies = read_messages(completion, "completion")
    else:
        replies = [_reply(row, "completion")]
    return [*_prompt(prompt, "prompt"), *replies]


def _from_question_answer(row: dict) -> list[dict]:
    return [user(row["question"], "question"), _reply(row, "answer")]


def _from_preference(row: dict) -> list[dict]:
    """The chosen side: a reply to `prompt`, or a whole conversation (with or without the prompt beside it)."""
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


def _from_transcript(text: str) -> list[dict]:
    """ "\\n\\nHuman: … \\n\\nAssistant: …", as Anthropic's hh-rlhf writes a conversation."""
    turns = ("\n\n" + text.strip()).split("\n\nHuman:")
    if turns[0].strip():
        raise Rejected("chosen has no prompt", "a transcript must start with `Human:`")
    messages = []
    for turn in turns[1:]:
        asked, *replies = turn.split("\n\nAssistant:")
        messages.append(user(asked.strip(), "chosen, Human"))
        messages += [assistant(reply.strip(), "chosen, Assistant") for reply in replies]
    return messages


def _prompt(prompt: Any, column: str) -> list[dict]:
    return read_messages(prompt, column) if isinstance(prompt, list) else [user(prompt, column)]


def _reply(row: dict, column: str) -> dict:
    """The reply in `column`, with the reasoning beside it."""
    message = assistant(row[column], column)
    reasoning = row.get(REASONING)
    if reasoning not in (None, ""):
        message[REASONING] = text_of(reasoning, REASONING)
    return message


class RowFormat(NamedTuple):
    """`needed` columns tell the format, `optional` ones are read where they stand; `read` makes the messages."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict], list[dict]] | None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needed + self.optional


# The first that fits wins.
FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(("messages",), SHARED, _from_messages),
    "sharegpt": RowFormat(("conversations",), SHARED, _from_sharegpt),
    "alpaca": RowFormat(("instruction", "output"), ("input", "history", REASONING, *SHARED), _from_alpaca),
    "prompt_completion": RowFormat(("prompt", "completion"), (REASONING, *SHARED), _from_prompt_completion),
    "question_answer": RowFormat(("question", "answer"), (REASONING, *SHARED), _from_question_answer),
    "preference": RowFormat(("chosen", "rejected"), ("prompt", REASONING, *SHARED), _from_preference),
    "text": RowFormat(("text",), (), None),
}
KNOWN = "; ".join(" + ".join(form.needed) for form in FORMATS.values())


class Reading(NamedTuple):
    """How to read the rows of one source: the row format (None: unknown), the columns to rename ({canonical: actual}),
    and whether the format was named by the user, who then asked for what preference data means.
    """

    row_format: str | None
    columns: dict[str, str]
    named: bool

    def own_columns(self) -> set[str]:
        """The actual names of the columns that the format reads."""
        canonical = FORMATS[self.row_format].columns if self.row_format else ()
        return {self.columns.get(name, name) for name in canonical}


def recognise(columns: Iterable[str]) -> str | None:
    """The row format that a set of column names tells, or None."""
    columns = set(columns)
    name = next((name for name, form in FORMATS.items() if columns.issuperset(form.needed)), None)
    return None if name == "text" and not columns.isdisjoint(LABELS) else name


def reading_of(source: str, asked: dict, column_sets: Counter) -> Reading:
    """Decide how to read a source, from the column sets (tuples, counted) of all its rows.

    asked: {row_format, columns} of the settings. With "auto" the format is the one that most rows have. Raises
    UserError for a column mapping that names what the format or the source doesn't have.
    """
    row_format, columns = asked.get("row_format") or "auto", asked.get("columns") or {}
    there = sorted({column for columns_of_row in column_sets for column in columns_of_row})
    for canonical, actual in columns.items():
        if column_sets and actual not in there:
            raise UserError(
                f"{source}: `columns: {{{canonical}: {actual}}}` names a column that no row has. The columns there: "
                f"{', '.join(there[:30]) or 'none'}"
            )
    named = row_format != "auto"
    if not named:
        row_format = _most_frequent(column_sets, columns)
    allowed = FORMATS[row_format].columns if row_format else {name for f in FORMATS.values() for name in f.columns}
    unknown = next((canonical for canonical in columns if canonical not in allowed), None)
    if unknown is not None and column_sets:
        what = f"the row format {row_format} has" if row_format else "the row formats have"
        raise UserError(f"{source}: `columns` maps '{unknown}', but {what} only {', '.join(sorted(allowed))}")
    return Reading(row_format, columns, named)


def _most_frequent(column_sets: Counter, columns: dict[str, str]) -> str | None:
    votes: Counter = Counter()
    for columns_of_row, count in column_sets.items():
        votes[recognise(_rename(dict.fromkeys(columns_of_row), columns))] += count
    del votes[None]
    order = list(FORMATS)
    return min(votes, key=lambda name: (-votes[name], order.index(name)), default=None)


def to_conversation(row: dict, reading: Reading, system_prompt: str | None = None) -> dict:
    """Read one row and check it; add `system_prompt` where a conversation has no system message.

    Raises Rejected with a reason that a person can act on. Lone surrogates and numbers that JSON can't hold may still
    be in the conversation: whoever encodes it finds them (`messages.why_not_json`).
    """
    if reading.columns:
        row = _rename(row, reading.columns)
    form = FORMATS.get(reading.row_format)
    if form is None:
        raise _unrecognised(row, reading)
    if reading.row_format == "preference" and not reading.named:
        raise Rejected(
            "preference data (chosen and rejected)", "`row_format: preference` trains on the chosen reply of each row"
        )
    for column in form.needed:
        if column not in row and column != "rejected":
            raise _unrecognised(row, reading)
    if not MEDIA.isdisjoint(row):
        column = next((column for column in sorted(MEDIA) if row.get(column)), None)
        if column:
            raise Rejected("images, audio and video are not read", f"the column '{column}'")
    if form.read is None:
        return {"text": text_of(row["text"], "text")}
    messages = _with_system(form.read(row), row, system_prompt)
    check_order(messages)
    tools = row.get("tools") or row.get("functions")
    tools = read_tools(tools) if tools else None
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def to_prompt(row: dict, reading: Reading) -> dict:
    """What a row of a test set asks, as a conversation with an empty reply: such rows often have none, or none in text.

    Raises Rejected where there is no prompt either.
    """
    try:
        return to_conversation(row, reading)
    except Rejected:
        row = _rename(row, reading.columns)
        column = next((name for name in PROMPTS if row.get(name)), None)
        if column is None:
            raise
    asked = _prompt(row[column], column)
    if isinstance(row.get("input"), str) and column == "instruction":
        asked[0]["content"] += f"\n\n{row['input']}"
    if asked[-1]["role"] != "assistant":
        asked.append({"role": "assistant", "content": ""})
    return {"messages": asked}


def _with_system(messages: list[dict], row: dict, system_prompt: str | None) -> list[dict]:
    """A `system` column is the system message unless the conversation has one already; then comes `system_prompt`."""
    system = row.get("system")
    if messages[0]["role"] == "system" or (system in (None, "") and not system_prompt):
        return messages
    content = system_prompt if system in (None, "") else text_of(system, "system")
    return [{"role": "system", "content": content}, *messages]


def _rename(row: dict, columns: dict[str, str]) -> dict:
    """The row with each `actual` column of {canonical: actual} under its canonical name."""
    actual = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in actual}
    return kept | {canonical: row[name] for canonical, name in columns.items() if name in row}


def _unrecognised(row: dict, reading: Reading) -> Rejected:
    columns = ", ".join(sorted(row)[:8]) or "none"
    if reading.row_format is None:
        hint = f"columns {columns}; known are {KNOWN}. `columns:` maps other names to them, `row_format:` names one"
        if "text" in row:
            hint += "; `row_format: text` trains on the text alone"
        return Rejected("unknown row format", f"{hint}. `convert:` brings any row into one of them")
    needed = " + ".join(FORMATS[reading.row_format].needed)
    if reading.named:
        return Rejected(
            f"columns of the row format {reading.row_format} are missing", f"it has {needed}; found {columns}"
        )
    return Rejected("columns unlike the rest of the source", f"columns {columns}; most rows there have {needed}")
