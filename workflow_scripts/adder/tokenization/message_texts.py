"""The texts of messages, and looking for them in what a template writes."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from adder.formatting.conversation import Message, ToolCall
from adder.tokenization.chat_template import Span


def strings(value: Any) -> Iterator[str]:
    """Every text within a value made of dictionaries and lists, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def is_written(value: str, text: str) -> bool:
    """Whether a value stands in a text: as it is, or as JSON, JSON within JSON or Python writes it."""
    value = value.strip()
    if value in text:
        return True
    escaped = _json(value, False), _json(value, True), _json(_json(value, False), False), repr(value)[1:-1]
    return any(form in text for form in escaped)


def _json(value: str, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only)[1:-1]


def unused_marker(marker: str, messages: Sequence[Message]) -> str:
    """A marker (with a 0 in it) that occurs nowhere in the messages."""
    while any(marker in text for text in strings(list(messages))):
        marker = marker.replace("0", "00")
    return marker


def with_content(message: Message, marker: str) -> Message:
    """A reply with a marker for its text, and as key and value of its calls' arguments.

    The calls' names stay: some templates write them beside the call's result as well.
    """
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": marker}
    other: list[ToolCall] = [{**c, "function": {**c["function"], "arguments": {marker: marker}}} for c in calls]
    return {**message, "tool_calls": other, "content": marker if message["content"].strip() else ""}


def reasoning_and_answer(message: Message) -> tuple[str, str]:
    """A reply's reasoning and its answer, stripped; both may stand in the content, with <think> around the former."""
    content = message["content"].strip()
    reasoning = message.get("reasoning_content", "").strip()
    if not reasoning and content.startswith("<think>") and "</think>" in content:
        inner, _, answer = content.removeprefix("<think>").partition("</think>")
        return inner.strip(), answer.strip()
    return reasoning, content


def common_prefix(one: str, other: str) -> int:
    """Length of the longest common beginning, by bisection: conversations are long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def joined(blocks: list[Span]) -> list[Span]:
    """Blocks with those that touch made one: a template may mark a reply and its end-of-turn token separately."""
    made: list[Span] = []
    for start, end in blocks:
        if made and made[-1][1] == start:
            start = made.pop()[0]
        made.append((start, end))
    return made
