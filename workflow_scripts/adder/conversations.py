"""One raw row to one conversation: the row formats that are recognised, and why a row can't be used.

A conversation is a list of {"role", "content"}: an optional system message, then user and assistant in turn, ending
with the assistant.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
# What we'd have to ignore to use such a message; ignoring it would train on the wrong tokens.
UNREAD_IN_MESSAGE = ("tool_calls", "function_call", "tool_call_id", "reasoning_content")
UNREAD_IN_ROW = ("tools", "functions")


class Rejected(Exception):
    """A row that can't be used. `kind` is counted; `detail` says what was found in this row."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def _from_messages(row: dict) -> list:
    return _message_list(row["messages"], "messages")


def _from_sharegpt(row: dict) -> list:
    messages = _message_list(row["conversations"], "conversations")
    return _with_system(row, messages)


def _from_alpaca(row: dict) -> list:
    task = _text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        task = f"{task}\n\n{_text(row['input'], 'input')}"
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Rejected("history is not a list of [instruction, output] pairs", f"found {_kind(history)}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Rejected("history is not a list of [instruction, output] pairs", f"entry {number} is none")
        turns += [_user(_text(pair[0], f"history {number}")), _assistant(_text(pair[1], f"history {number}"))]
    return _with_system(row, [*turns, _user(task), _assistant(_text(row["output"], "output"))])


def _from_prompt_completion(row: dict) -> list:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        return _message_list(prompt, "prompt") + _message_list(completion, "completion")
    messages = [_user(_text(prompt, "prompt")), _assistant(_text(completion, "completion"))]
    return _with_system(row, messages)


def _from_question_answer(row: dict) -> list:
    messages = [_user(_text(row["question"], "question")), _assistant(_text(row["answer"], "answer"))]
    return _with_system(row, messages)


# Name, the columns that tell it, and the function that reads it; the first that fits wins.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict], list]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "prompt_completion": (("prompt", "completion"), _from_prompt_completion),
    "question_answer": (("question", "answer"), _from_question_answer),
}
KNOWN = "; ".join(" + ".join(columns) for columns, _ in FORMATS.values())


def recognise(columns: Iterable[str]) -> str | None:
    """The row format that a set of column names tells, or None."""
    columns = set(columns)
    return next((name for name, (needed, _) in FORMATS.items() if columns.issuperset(needed)), None)


def recognise_source(column_sets: Counter) -> str | None:
    """The format of a source from its rows' column sets (tuples, counted): the one that most rows have, or None."""
    votes: Counter = Counter()
    for columns, count in column_sets.items():
        votes[recognise(columns)] += count
    del votes[None]
    order = list(FORMATS)
    return min(votes, key=lambda name: (-votes[name], order.index(name)), default=None)


def to_messages(row: dict, row_format: str | None, system_prompt: str | None = None) -> list[dict]:
    """Read one row as `row_format` and check it; add `system_prompt` where the row has no system message.

    Raises Rejected with a reason that a person can act on.
    """
    if row_format is None or not set(row).issuperset(FORMATS[row_format][0]):
        raise _unrecognised(row, row_format)
    for key in UNREAD_IN_ROW:
        if row.get(key):
            raise Rejected(f"the column '{key}' is not read yet", "tool calls can't be trained on")
    messages = FORMATS[row_format][1](row)
    _check_order(messages)
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def _unrecognised(row: dict, row_format: str | None) -> Rejected:
    columns = ", ".join(sorted(row)[:8]) or "none"
    if "chosen" in row and "rejected" in row:
        return Rejected("preference data (chosen/rejected) is not read", "give the chosen reply as `completion`")
    if row_format is None:
        return Rejected(
            "unknown row format", f"columns {columns}; known are {KNOWN}. `convert:` can bring any row into one of them"
        )
    needed = " + ".join(FORMATS[row_format][0])
    return Rejected("columns unlike the rest of the source", f"columns {columns}; most rows there have {needed}")


def _message_list(value: Any, column: str) -> list[dict]:
    if not isinstance(value, list):
        raise Rejected(f"{column} is not a list", f"found {_kind(value)}")
    if not value:
        raise Rejected(f"{column} is empty")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int) -> dict:
    """One {"role", "content"} out of a role/content or from/value object."""
    if not isinstance(message, dict):
        raise Rejected("a message is not an object", f"message {number} is {_kind(message)}")
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    for key in UNREAD_IN_MESSAGE:
        if message.get(key):
            raise Rejected(f"'{key}' in a message is not read yet", f"message {number}")
    if message.get("train") not in (None, True) or message.get("weight") not in (None, 1):
        raise Rejected("a message's own weight or train mark is not read yet", f"message {number}")
    name = message.get(role_key)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        found = f"'{name[:40]}'" if isinstance(name, str) else _kind(name)
        raise Rejected("unknown role", f"message {number} has {role_key} {found}; known are {', '.join(ROLES)}")
    return {"role": role, "content": _text(message.get(content_key), f"{role} message {number}")}


def _text(value: Any, where: str) -> str:
    """The text itself, which must not be blank."""
    if isinstance(value, list):
        raise Rejected("content is not text", f"{where} is a list (typed parts are not read yet)")
    if not isinstance(value, str):
        raise Rejected("content is not text", f"{where} is {_kind(value)}")
    if not value.strip():
        raise Rejected("content is empty", where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Rejected("invalid unicode", f"{where} has half a surrogate pair") from None
    return value


def _check_order(messages: list[dict]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        raise Rejected("no assistant turn", f"roles: {_joined(roles)}")
    if "system" in turns:
        raise Rejected("a system message that is not the first", f"roles: {_joined(roles)}")
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)):
        raise Rejected("user and assistant do not alternate, user first", f"roles: {_joined(roles)}")
    if turns[-1] != "assistant":
        raise Rejected("the last message is not the assistant's", f"roles: {_joined(roles)}")


def _with_system(row: dict, messages: list[dict]) -> list[dict]:
    """A `system` column is the system message, unless the row has one already."""
    system = row.get("system")
    if system in (None, "") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def _joined(roles: list[str]) -> str:
    return ", ".join(roles[:8]) + (", …" if len(roles) > 8 else "")


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
