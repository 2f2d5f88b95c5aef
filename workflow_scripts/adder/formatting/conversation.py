"""A conversation as the stage "format" writes it and later stages read it: the column `conversation`, as JSON."""

from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Function(TypedDict):
    """What a tool call calls."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A tool call in OpenAI's form, its arguments an object."""

    type: Literal["function"]
    id: NotRequired[str]
    function: Function


class Message(TypedDict):
    """One turn. `content` is text; it is empty only beside tool calls, and where a test set has no reply.

    train: false on a reply that is not to be trained on. unlearnt: parts of a reply's content, (start, end) in
    characters, that carry no loss. tool_call_id: on a tool's result, the call that it answers.
    """

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]
    unlearnt: NotRequired[list[tuple[int, int]]]


class Conversation(TypedDict, total=False):
    """Messages, with tools where there are some; or one plain text, which is trained on as it is.

    tools: definitions in OpenAI's form, {"type": "function", "function": {"name", ...}}.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    text: str
