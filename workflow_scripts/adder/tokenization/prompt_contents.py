"""Whether a template writes all that a conversation says: messages and tools, looked for by texts of our own."""

import json
from collections.abc import Mapping
from typing import Any

import orjson

from adder.formatting.conversation import Message
from adder.tokenization.chat_template import ChatTemplate, UnusableRow
from adder.tokenization.message_texts import is_written

Tools = list[dict[str, Any]]

MOST_KNOWN = 10_000  # lists of tools that are remembered


class PromptContents:
    """Checks that nothing of a conversation is left out of its text.

    A content may occur elsewhere in the text (a tool's name in a call, "yes" in a question), so each layout is rendered
    once with contents that occur nowhere else. Each conversation's own contents are looked for as well, for a template
    may drop or rewrite only some.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.unwritten_of_tools: set[str] = set()  # what of tool definitions is left out: "descriptions", ...
        self._known: dict[tuple[object, ...], str] = {}  # layout -> what is wrong with it, "" for nothing
        self._marked: dict[bytes, tuple[Tools, str]] = {}  # tools -> see _mark

    def forget(self) -> None:
        """Have `unwritten_of_tools` tell of what is met from here on."""
        self.unwritten_of_tools = set()
        self._known.clear()

    def check(self, messages: list[Message], tools: Tools | None, prompt: str) -> None:
        """Raise UnusableRow if `prompt`, for a reply to these messages, lacks one of them or the tools."""
        for number, message in enumerate(messages, 1):
            role = message["role"]
            if role != "assistant":
                written = is_written(message["content"], prompt)
            else:
                written = is_written(message["content"].split("</think>")[-1], prompt)
            if not written:
                raise UnusableRow(
                    f"the chat template leaves out or rewrites message {number} ({role})",
                    f"the chat template leaves out or rewrites a message ({role})",
                )
        self.check_layout(messages, tools)

    def check_layout(self, messages: list[Message], tools: Tools | None) -> None:
        """Raise UnusableRow if something is left out of the prompt for a reply to such messages with such tools."""
        marked, shape = self._mark(tools) if tools else ([], "")
        key = tuple([_layout(message) for message in messages]), shape
        if key not in self._known:
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._complaint(messages, marked)
        if self._known[key]:
            raise UnusableRow(self._known[key])

    def _mark(self, tools: Tools) -> tuple[Tools, str]:
        """The tools with names and descriptions that occur nowhere else, and the same as a text."""
        try:
            key = orjson.dumps(tools)
        except TypeError:  # whole numbers of more than 64 bits
            key = json.dumps(tools).encode()
        if key not in self._marked:
            if len(self._marked) > MOST_KNOWN:
                self._marked.clear()
            marked = [_marked_tool(tool, number) for number, tool in enumerate(tools)]
            self._marked[key] = marked, json.dumps(marked)
        return self._marked[key]

    def _complaint(self, messages: list[Message], marked_tools: Tools) -> str:
        """What of a layout doesn't reach the prompt of its last reply, as a reason; empty if all does."""
        marked: list[Message] = []
        for number, message in enumerate(messages):
            changed: Message = {**message}
            if message["content"].strip():
                changed["content"] = f"CONTENT{number}CONTENT"
            marked.append(changed)
        try:
            prompt = self.template.render(marked, prompt=True, tools=marked_tools or None)
        except UnusableRow:
            return ""  # the template takes no such names; the conversation's own contents have been found
        for message in marked:
            if message["role"] != "assistant" and message["content"].strip() not in prompt:
                return f"the chat template leaves out a message ({message['role']})"
        for number, _ in enumerate(marked_tools):
            if f"TOOL{number}TOOL" not in prompt:
                return "the chat template has no place for the list of tools"
            missing = {kind for kind in TOOL_TEXTS if f"{kind}{number}" in str(marked_tools[number])} - {
                kind for kind in TOOL_TEXTS if f"{kind}{number}" in prompt
            }
            self.unwritten_of_tools |= {TOOL_TEXTS[kind] for kind in missing}
        return ""


# Texts of a definition, by the marker that stands for them.
TOOL_TEXTS = {"TOOLTEXT": "descriptions", "ARGUMENT": "names of arguments", "ARGTEXT": "descriptions of arguments"}


def _layout(message: Message) -> tuple[object, ...]:
    calls = message.get("tool_calls", [])
    return message["role"], len(message), len(calls), bool(message["content"].strip())


def _marked_tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A tool's definition with names and descriptions that occur nowhere else."""
    function = dict(tool.get("function", tool))
    function["name"] = f"TOOL{number}TOOL"
    if isinstance(function.get("description"), str):
        function["description"] = f"TOOLTEXT{number}"
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
        names = {name: f"ARGUMENT{number}x{place}" for place, name in enumerate(parameters["properties"])}
        properties = {names[name]: _marked_argument(value, number) for name, value in parameters["properties"].items()}
        function["parameters"] = {**parameters, "properties": properties}
        if isinstance(parameters.get("required"), list):
            function["parameters"]["required"] = [names.get(name, name) for name in parameters["required"]]
    return {**tool, "function": function} if "function" in tool else function


def _marked_argument(argument: Any, number: int) -> Any:
    if isinstance(argument, dict) and isinstance(argument.get("description"), str):
        return {**argument, "description": f"ARGTEXT{number}"}
    return argument
