"""The messages of a conversation, out of the ways in which people write them: OpenAI's, ShareGPT's, axolotl's, TRL's.

`conversation.py` says what they become. Whatever is ambiguous or would be lost is a `Rejected`, never a guess.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from adder.data.repeated_keys import refuse_repeated
from adder.formatting import api_messages
from adder.formatting.api_messages import OTHER_PART, kind_of_part, own_text
from adder.formatting.conversation import Conversation, Function, Message, Role, ToolCall
from adder.formatting.marks import MESSAGE_MARKS, SPANS, is_learnt
from adder.formatting.rejected import Rejected, json_type
from adder.formatting.train_spans import covers, unlearnt_parts

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the value is the call, as JSON
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_plan")
UNREAD = ("tools", "functions", "images", "audio", "video")  # to ignore them would train on something else
BLANK = (None, "", [])
PYTHONS = re.compile(r"\s*(\[\s*)?\{\s*'")  # how a list of dictionaries or a dictionary begins
MESSAGE_KEYS = frozenset(
    {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name"}.union(
        REASONING_KEYS, UNREAD, MESSAGE_MARKS
    )
)
# A message without a role: each key is who speaks, in order.
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
}


def user(content: Any, where: str) -> Message:
    """A user message; `where` names the content if it is no text."""
    return {"role": "user", "content": as_text(content, where)}


def assistant(content: Any, where: str) -> Message:
    """A reply; `where` names the content if it is no text."""
    return {"role": "assistant", "content": as_text(content, where)}


def as_text(value: Any, where: str) -> str:
    """The text of a content; a number, true or false and an object are written as JSON."""
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and (
            kind in api_messages.TEXT_PARTS or kind in value
        ):  # one typed part without its list
            return text_of([value], where)
    elif not isinstance(value, bool | int | float):
        return text_of(value, where)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):  # thousands of digits
        raise Rejected("content is not text", f"{where} is nested too deep or too long a number") from None


def is_message(value: Any) -> bool:
    """Whether a value is one message by its keys."""
    return isinstance(value, dict) and any({who, what} <= value.keys() for who, what in _PAIRS)


_PAIRS = (("role", "content"), ("from", "value"))


def text_of(value: Any, where: str) -> str:
    """The text itself, or that of its typed parts joined; it must not be blank."""
    if not isinstance(value, str):
        if isinstance(value, list):
            return text_of("".join([_part(part, where) for part in value]), where)
        raise Rejected("content is not text", f"{where} is {json_type(value)}")
    if not value or value.isspace():
        raise Rejected("content is empty", where)
    return value


def read_messages(value: Any, column: str) -> list[Message]:
    """Role/content or from/value objects as messages, in whatever order they stand.

    An empty system message is left out: it says nothing.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a table's cell holds it
        value = parse_json(value, column)
    if not isinstance(value, list):
        raise Rejected(f"{column} is not a list", f"found {json_type(value)}")
    if value and isinstance(value[0], dict) and not value[0].keys().isdisjoint(SPEAKERS):
        value = list(_spoken(value))
    numbered = enumerate(value, 1) if all(map(api_messages.is_plain, value)) else api_messages.plain(value)
    read = [_message(message, number) for number, message in numbered]
    messages = [message for message in read if message is not None]
    if not messages:
        raise Rejected(f"{column} is empty")
    return messages


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Tool definitions in OpenAI's form, from a list or its JSON, also as other APIs have them; {"type": "function"} is
    put around bare ones.
    """
    value = parse_json(value, "tools") if isinstance(value, str) else value
    if value is None:
        return []
    if isinstance(value, list):
        value = [
            parse_json(tool, f"tool {number}") if isinstance(tool, str) else tool
            for number, tool in enumerate(value, 1)
        ]
    value = api_messages.tools_of(value)
    if not isinstance(value, list):
        raise Rejected("tools are not a list of definitions", f"found {json_type(value)}")
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(value, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Rejected("tools are not a list of definitions", f"tool {number} has no name")
        tools.append({"type": "function", "function": tool} if function is tool else tool)
    return tools


def check_order(messages: list[Message]) -> None:
    """Refuse an order of roles that is wrong for every chat template, and replies none of which is to be trained on."""
    roles = [message["role"] for message in messages]
    if roles == ["user", "assistant"] and "train" not in messages[1]:  # nearly all there are
        return
    if "assistant" not in roles:
        raise Rejected("no assistant turn", f"roles: {_joined(roles)}")
    if "system" in roles[1:]:
        raise Rejected("a system message that is not the first", f"roles: {_joined(roles)}")
    if roles[-1] != "assistant":
        raise Rejected("the last message is not the assistant's", f"roles: {_joined(roles)}")
    if "tool" in roles:
        _check_results(messages)
    if all("train" in message for message in messages if message["role"] == "assistant"):
        raise Rejected("no reply to train on", "every assistant message has weight 0 or train: false")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text within a row; NaN and infinities are no JSON."""
    try:
        if not text.strip():
            return None
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=refuse_repeated)
    except (ValueError, RecursionError) as error:
        reason = f"{where}: {error or 'nested too deep'}"
        if PYTHONS.match(text):
            reason += "; it is in Python's notation, as tables are saved to CSV by pandas: save them as Parquet or JSON"
        raise Rejected("broken JSON within the row", reason) from None


def why_not_json(conversation: Conversation, error: Exception) -> Rejected:
    """The reason why a conversation can't be encoded as JSON in UTF-8."""
    if _has_lone_surrogate(conversation.get("text")):
        return Rejected("invalid unicode", "text has half a surrogate pair")
    for number, message in enumerate(conversation.get("messages", []), 1):
        if _has_lone_surrogate(message):
            return Rejected("invalid unicode", f"{message['role']} message {number} has half a surrogate pair")
    if _has_lone_surrogate(conversation.get("tools")):
        return Rejected("invalid unicode", "tools have half a surrogate pair")
    return Rejected("tools or tool calls that JSON can't hold", str(error))


def _spoken(turns: list[Any]) -> Iterator[Any]:
    """{"human": ..., "assistant": ...} as messages; what has a role, or is none of these, stays as it is."""
    for turn in turns:
        spoken = isinstance(turn, dict) and "role" not in turn and "from" not in turn
        if not spoken or turn.keys().isdisjoint(SPEAKERS):
            yield turn
            continue
        unread = next((key for key in turn if key not in SPEAKERS and turn[key] not in BLANK), None)
        if unread is not None:
            raise Rejected("a turn has a key that is no speaker", f"'{unread[:40]}'; known are {', '.join(SPEAKERS)}")
        yield from ({"role": SPEAKERS[key], "content": turn[key]} for key in SPEAKERS if turn.get(key) not in BLANK)


def _message(message: Any, number: int) -> Message | None:
    """One message; None for an empty system message at the start."""
    if not isinstance(message, dict):
        remedy = "; where texts take turns, `convert:` says whose each is" if isinstance(message, str) else ""
        raise Rejected("a message is not an object", f"message {number} is {json_type(message)}{remedy}")
    role_key = "role" if "role" in message else "from"
    name = message.get(role_key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        name, role = _unusual_role(message, number, role_key)
    content = message.get("content")
    if content is None:
        content = message.get("value")
    where = f"{role} message {number}"
    if len(message) == 2 and isinstance(content, str) and content and name not in CALL_ROLES:  # nearly all there are
        return {"role": role, "content": text_of(content, where)}
    if name in CALL_ROLES:
        calls = _tool_calls(parse_json(content, where) if isinstance(content, str) else content, where)
        read: Message = {"role": role, "content": "", "tool_calls": calls}
    elif role == "system" and number == 1 and content in BLANK:
        return None
    elif role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
        content = "" if content in BLANK else content
        text = "" if isinstance(content, str) and not content.strip() else text_of(content, where)
        read = {"role": role, "content": text}
    else:
        read = {"role": role, "content": as_text(content, where) if role == "assistant" else text_of(content, where)}
    _read_extras(message, read, where)
    return read


def _unusual_role(message: dict[str, Any], number: int, key: str) -> tuple[str, Role]:
    """A role in other case or with spaces around it."""
    name = message.get(key)
    plain = name.strip().lower() if isinstance(name, str) else ""
    if plain in ROLES:
        return plain, ROLES[plain]
    if key not in message:
        keys = ", ".join(str(one)[:40] for one in list(message)[:8]) or "none"
        remedy = "`message_keys: {role: …, content: …}` says what they are called"
        raise Rejected("unknown role", f"message {number} has no role; its keys are {keys}. {remedy}")
    found = f"'{name[:40]}'" if isinstance(name, str) else json_type(name)
    known = f"known are {', '.join(ROLES)}; `roles: {{assistant: …}}` says which others mean one of them"
    raise Rejected("unknown role", f"message {number} has {key} {found}; {known}")


def _read_extras(message: Mapping[str, Any], read: Message, where: str) -> None:
    """What a message has beside role and content: reasoning, tool calls and results, a name, a weight."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) not in BLANK), None)
    calls = message.get("tool_calls") or message.get("function_call")
    if read["role"] == "assistant":
        if reasoning is not None:
            read["reasoning_content"] = text_of(reasoning, f"{where}, its reasoning")
        if calls and "tool_calls" not in read:
            read["tool_calls"] = _tool_calls(parse_json(calls, where) if isinstance(calls, str) else calls, where)
        if not is_learnt(message, where):
            read["train"] = False
        elif not message.keys().isdisjoint(SPANS):
            _read_spans(message, read, where)
    elif reasoning is not None or calls:
        found = "reasoning" if reasoning is not None else "a tool call"
        raise Rejected("only an assistant message can have reasoning or tool calls", f"{where} has {found}")
    unread = next((key for key in UNREAD if message.get(key)), None)
    if unread:
        raise Rejected(f"'{unread}' within a message is not read", f"{where}; tools belong into the column `tools`")
    for key in ("tool_call_id", "name"):
        value = message.get(key)
        if value not in (None, "") and (key == "name" or read["role"] == "tool"):
            if not isinstance(value, str):
                raise Rejected(f"{key} is not text", f"{where}: {json_type(value)}")
            read[key] = value


def _read_spans(message: Mapping[str, Any], read: Message, where: str) -> None:
    """Which parts of a reply's text are not to be learnt; where that is all there is to it, it isn't learnt at all."""
    key = next((key for key in SPANS if message.get(key) not in (None, [], {})), None)
    if key is None:
        return
    parts = unlearnt_parts(message[key], key, read["content"], where)
    if covers(parts, read["content"]) and "reasoning_content" not in read and "tool_calls" not in read:
        read["train"] = False
    elif parts:
        read["unlearnt"] = parts


def _tool_calls(calls: Any, where: str) -> list[ToolCall]:
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise Rejected("broken tool call", f"{where}: expected a list of calls, found {json_type(calls)}")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> ToolCall:
    """One call in OpenAI's form, from that or from a bare {"name", "arguments"}; arguments become an object."""
    call = parse_json(call, where) if isinstance(call, str) else call
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise Rejected("broken tool call", f"{where}: a call has no name")
    if call.get("type") not in (None, "", "function", "tool_call"):
        raise Rejected("broken tool call", f"{where}: a call of the type {str(call['type'])[:40]!r}, not function")
    arguments = function.get("arguments", function.get("parameters", function.get("args")))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}, the arguments of {function['name'][:40]}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        found = json_type(arguments)
        raise Rejected(
            "broken tool call", f"{where}: the arguments of {function['name'][:40]} are {found}, not an object"
        )
    identity = call.get("id")
    called: Function = {"name": function["name"], "arguments": arguments}
    if isinstance(identity, str) and identity:
        return {"type": "function", "id": identity, "function": called}
    return {"type": "function", "function": called}


def _check_results(messages: list[Message]) -> None:
    """Each tool result follows a reply with tool calls, or another result of it, and answers a call that was made."""
    calls: list[ToolCall] = []
    for number, message in enumerate(messages, 1):
        if message["role"] != "tool":
            calls = message.get("tool_calls", [])
            continue
        if not calls:
            remedy = (
                "where replies call tools in their text, `roles: {user: …}` with the role of results keeps these texts"
            )
            raise Rejected("a tool result without a tool call before it", f"message {number}; {remedy}")
        identities = {call["id"] for call in calls if "id" in call}
        identity = message.get("tool_call_id")
        if identity is not None and identities and identity not in identities:
            raise Rejected("a tool result without a tool call before it", f"message {number} answers '{identity[:40]}'")


def _part(part: Any, where: str) -> str:
    """The text of one typed part of a content."""
    if not isinstance(part, dict):
        raise Rejected("content is not text", f"{where} is a list that holds {json_type(part)}")
    kind, found = kind_of_part(part, where)
    if kind != "text":
        raise Rejected(OTHER_PART, f"{where} has a part that is {kind}")
    return own_text(found, where)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _has_lone_surrogate(value: Any) -> bool:
    waiting = [value]  # not recursive: the nesting is the row's
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                return True
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return False


def _joined(roles: list[str]) -> str:
    return ", ".join(roles[:8]) + (", …" if len(roles) > 8 else "")
