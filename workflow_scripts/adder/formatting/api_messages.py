"""Messages as the APIs of several makers take them, brought to the keys of OpenAI's chat completions.

Anthropic's and Vercel's content blocks, Gemini's `parts`, the items of OpenAI's Responses, Bedrock's Converse, Cohere's
and LangChain's names. What has no place in a message of ours is a `Rejected`, never left out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adder.formatting.marks import MESSAGE_MARKS, is_learnt
from adder.formatting.rejected import Rejected, json_type

Raw = dict[str, Any]
Kind = str  # of a part: text, reasoning, call or result

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning", "reasoning_text", "summary_text")
CALL_PARTS = ("tool_use", "tool-call", "tool_call", "function_call", "functioncall")
RESULT_PARTS = ("tool_result", "tool-result", "function_call_output", "function_response", "functionresponse")
MEDIA_PARTS = re.compile("(input_)?(image|audio|video|file|document|resource)(_url|_data|-data)?")
# A part without a type, which is what its one key says: Gemini's and Bedrock's.
KEYED_PARTS: dict[str, Kind] = {
    "text": "text",
    "reasoningContent": "reasoning",
    "functionCall": "call",
    "function_call": "call",
    "toolUse": "call",
    "functionResponse": "result",
    "function_response": "result",
    "toolResult": "result",
}
KINDS: dict[str, Kind] = {
    **dict.fromkeys(TEXT_PARTS, "text"),
    **dict.fromkeys(REASONING_PARTS, "reasoning"),
    **dict.fromkeys(CALL_PARTS, "call"),
    **dict.fromkeys(RESULT_PARTS, "result"),
}
ROLE_KEYS = ("role", "from", "author")
CONTENT_KEYS = ("content", "value", "parts", "message", "text")  # the first that is there
# With one of these an object may be a message or a part of one, whatever else it has.
SAYING = frozenset((*ROLE_KEYS, "type", "content", "value", "parts", "message", "data", "speaker", "utterance"))
ITEMS = ("message", "reasoning", "function_call", "function_call_output", "item_reference", "custom_tool_call")
SPEAKING_TYPES = {  # LangChain's messages say by their type who speaks
    "human": "user",
    "ai": "assistant",
    "AIMessageChunk": "assistant",
    "HumanMessage": "user",
    "AIMessage": "assistant",
    "SystemMessage": "system",
    "ToolMessage": "tool",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
NAMES = ("name", "toolName", "tool_name")
ARGUMENTS = ("input", "args", "arguments", "parameters")
CALL_IDS = ("id", "call_id", "toolUseId", "tool_use_id", "toolCallId", "tool_call_id")  # of a call
ANSWERED = ("tool_use_id", "toolUseId", "call_id", "toolCallId", "tool_call_id", "id")  # by a result
RESULTS = ("content", "output", "result", "response")
KIND = "parts of a reply in an order that a message can't have"
OTHER_PART = "content has a part that is not text"
# Keys of messages, of items and of parts that are read here, or say nothing of what is said.
READ_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS, "type", "data", "tool_plan"))
ITEM_KEYS = frozenset((*READ_KEYS, "id", "status", "call_id", "arguments", "output", "summary"))
PART_KEYS = frozenset(
    {*KINDS, *KEYED_PARTS, *NAMES, *ARGUMENTS, *CALL_IDS, *ANSWERED, *RESULTS, *MESSAGE_MARKS, "type", "thought"}.union(
        ("reasoningText", "signature", "thoughtSignature", "thought_signature", "annotations", "logprobs", "citations"),
        ("cache_control", "cachePoint"),
    )
)


def is_plain(message: Any) -> bool:
    """Whether a message is already one with a role and a text, as nearly all are."""
    if not isinstance(message, dict) or "parts" in message:
        return False
    return ("role" in message and isinstance(message.get("content"), str)) or (
        "from" in message and isinstance(message.get("value"), str)
    )


def plain(messages: list[Any]) -> Iterator[tuple[int, Any]]:
    """(number from 1, message) with the keys of OpenAI's chat completions; what is no message is left as it is.

    A message that holds several results becomes several. Items that follow one another and make one turn of the
    assistant's (reasoning, text, calls) become one. Raises Rejected.
    """
    turn: Raw | None = None  # the assistant's, of items that have been read
    turn_number = 0
    for number, message in enumerate(messages, 1):
        item = _kind_of_item(message)
        if item is None or item == "function_call_output":
            if turn is not None:
                yield turn_number, turn
                turn = None
            if item is None:
                yield from ((number, one) for one in _messages(message, number))
            else:
                yield number, _result(message, f"item {number}")
            continue
        part = _item(message, item, number)
        if turn is not None and _continues(turn, part):
            turn = _joined(turn, part)
            continue
        if turn is not None:
            yield turn_number, turn
        turn, turn_number = part, number
    if turn is not None:
        yield turn_number, turn


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages or of items, by its first entry's keys, and not one of content parts."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    first = value[0]
    if is_calls(value):
        return False
    if _kind_of_item(first) is not None:
        return True
    if isinstance(first.get("text"), str) and not any(key in first for key in ROLE_KEYS):
        return False
    return "type" not in first or any(key in first for key in ROLE_KEYS) or _speaker(first) is not None


def is_said(value: Any) -> bool:
    """Whether a value is a list of messages of which each says who speaks, and what."""
    return is_messages(value) and all(
        isinstance(one, dict) and any(key in one for key in ROLE_KEYS) and content_key(one) is not None for one in value
    )


def is_other_part(part: Any) -> bool:
    """Whether a value is a typed part of a content, and no text."""
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and KINDS.get(kind, "text") != "text"


def is_calls(value: Any) -> bool:
    """Whether a value is a list of tool calls: {name, arguments}, or OpenAI's form."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict)
            and "role" not in one
            and (one.get("type") is None or one.get("type") == "function")
            and ({"name", "arguments"} <= one.keys() or isinstance(one.get("function"), dict))
            for one in value
        )
    )


def is_data(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages, content parts or calls, such as what was found in a
    text.
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and one.keys().isdisjoint(SAYING) and len(one) > 1 for one in value)
        and not is_calls(value)
    )


def text_of_parts(value: Any) -> Any:
    """Gemini's system instruction, an object with `parts`, as the list of these; anything else as it is."""
    return value["parts"] if isinstance(value, dict) and isinstance(value.get("parts"), list) else value


def tools_of(value: Any) -> Any:
    """Tool definitions out of what APIs put around them: {"tools": [...]}, Gemini's functionDeclarations, Bedrock's
    toolSpec; each with a name, a description and `parameters` in JSON Schema. Anything else as it is.
    """
    if isinstance(value, dict) and "name" not in value and "function" not in value:
        if isinstance(value.get("tools"), list):
            value = value["tools"]
        elif not value.keys().isdisjoint(("functionCallingConfig", "function_calling_config", "toolChoice")):
            return []  # how tools may be called, and no tools
        else:
            value = [value]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [tool for one in value for tool in _tools(one)]


def content_key(message: Mapping[str, Any], where: str = "message") -> str | None:
    """Under which key a message says what it says; None where it says nothing. Raises Rejected where two differ."""
    said = [key for key in CONTENT_KEYS if message.get(key) not in (None, "", [])]
    if "parts" in said and said[0] in ("content", "value") and isinstance(message["parts"], list):
        texts = [
            part["text"] for part in message["parts"] if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if message[said[0]] != "".join(texts):
            raise Rejected("a message that says two things", f"{where} has '{said[0]}' and 'parts', which differ")
        return "parts"
    return said[0] if said else next((key for key in ("content", "value") if key in message), None)


def _kind_of_item(message: Any) -> str | None:
    """The type of an item of OpenAI's Responses that belongs to a turn of the assistant's, or is a result."""
    if not isinstance(message, dict):
        return None
    kind = message.get("type")
    if isinstance(kind, str) and kind in ITEMS and (kind == "message" or "role" not in message):
        return None if kind == "message" and message.get("role") != "assistant" else kind
    call = isinstance(kind, str) and kind.endswith(("_call", "_call_output")) and "role" not in message
    return kind if call else None


def _item(item: Raw, kind: str, number: int) -> Raw:
    where = f"item {number}"
    if kind == "message":
        return next(
            _messages({key: value for key, value in item.items() if key not in ("type", "id", "status")}, number)
        )
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        return {"role": "assistant", "reasoning_content": _text(parts, where, "\n\n"), **_marks(item)}
    if kind == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(item, where)], **_marks(item)}
    raise Rejected("an item of a type that is not read", f"{where} is of the type '{kind[:40]}'")


def _continues(turn: Raw, part: Raw) -> bool:
    """Whether a part is said in the same turn: reasoning, then a text, then calls."""
    if "tool_calls" in turn or "content" in turn:
        return "tool_calls" in part and not part.get("content") and "reasoning_content" not in part
    return "reasoning_content" not in part


def _joined(turn: Raw, part: Raw) -> Raw:
    if _marks(turn) != _marks(part):
        raise Rejected("marks of one turn that differ", "reasoning, text and calls of a turn are learnt together")
    calls = [*turn.get("tool_calls", []), *part.get("tool_calls", [])]
    return {**part, **turn, "content": turn.get("content") or part.get("content", "")} | (
        {"tool_calls": calls} if calls else {}
    )


def _messages(message: Any, number: int) -> Iterator[Any]:
    """One message, or what it is made of."""
    if not isinstance(message, dict):
        yield message
        return
    message = _with_role(message)
    where = f"message {number}"
    key = content_key(message, where)
    if key is None or (key in ("content", "value") and not isinstance(message[key], list)):
        yield message
        return
    role_key = "role" if "role" in message else "from"
    role = message.get(role_key)
    content = message[key]
    rest = {name: value for name, value in message.items() if name not in (key, role_key, "content")}
    if not isinstance(content, list):
        yield {"role": role, "content": content, **rest}
        return
    read = list(_parts(content, where, bare_texts=key == "parts"))
    if all(kind == "text" and not _marks(part) for kind, part in read):
        yield {"role": role, "content": "".join([own_text(part, where) for _, part in read]), **rest}
    elif isinstance(role, str) and role.strip().lower() in ("user", "human", "tool", "function", "system", "developer"):
        yield from _asked(role, read, rest, where)
    else:
        yield _reply(role, read, rest, where)


def _with_role(message: Raw) -> Raw:
    """The message with `role` under that name, and LangChain's `data` unpacked."""
    if "role" in message or "from" in message:
        return message
    if "author" in message:
        return {"role": message["author"], **{key: value for key, value in message.items() if key != "author"}}
    role = _speaker(message)
    if role is None:
        return {"role": "user", **message} if "parts" in message else message  # Gemini's default
    message = {key: value for key, value in message.items() if key != "type"}
    if isinstance(message.get("data"), dict):
        message = {**message.pop("data"), **message}
        message.pop("type", None)
    more = message.pop("additional_kwargs", None) or {}
    if not isinstance(more, dict):
        raise Rejected("a message of LangChain's that can't be read", f"its additional_kwargs are {json_type(more)}")
    return {"role": role, **more, **{key: value for key, value in message.items() if value not in (None, [])}}


def _speaker(message: Raw) -> str | None:
    kind = message.get("type")
    return SPEAKING_TYPES.get(kind) if isinstance(kind, str) and ("content" in message or "data" in message) else None


def _parts(content: list[Any], where: str, bare_texts: bool) -> Iterator[tuple[Kind, Raw]]:
    for part in content:
        if isinstance(part, str) and bare_texts:
            part = {"text": part}
        if not isinstance(part, dict):
            raise Rejected("content is not text", f"{where} is a list that holds {json_type(part)}")
        yield kind_of_part(part, where)


def kind_of_part(part: Raw, where: str) -> tuple[Kind, Raw]:
    """What a part is, and the part with its keys in one object."""
    kind = part.get("type")
    if kind is None:
        keyed = [key for key in part if key in KEYED_PARTS and part[key] is not None]
        others = [key for key in part if key not in PART_KEYS and part[key] is not None]
        if len(keyed) == 1 and not others:
            found = KEYED_PARTS[keyed[0]]
            value = part[keyed[0]]
            if found == "text":
                return ("reasoning" if part.get("thought") is True else "text"), part
            if isinstance(value, dict):
                return found, {**value, **_marks(part)}
        keys = ", ".join(str(key)[:40] for key in list(part)[:8]) or "none"
        if keyed == ["text"]:
            shown = ", ".join(str(key)[:40] for key in others[:8])
            raise Rejected(
                "content is not text", f"{where} has a part with more than a text, and nothing reads {shown}"
            )
        if not keyed and others:
            raise Rejected(OTHER_PART, f"{where} has a part with the keys {keys}")
        raise Rejected("content is not text", f"{where}: a part that is no text; its keys are {keys}")
    found = KINDS.get(kind) if isinstance(kind, str) else None
    if found is None:
        shown = kind[:40] if isinstance(kind, str) else json_type(kind)
        raise Rejected(OTHER_PART, f"{where} has a part of the type '{shown}'")
    return found, part


def _asked(role: str, parts: list[tuple[Kind, Raw]], rest: Raw, where: str) -> Iterator[Raw]:
    """What stands in a message that is no reply: results, each a message, and texts, joined where they adjoin."""
    texts: list[str] = []
    for kind, part in parts:
        if kind == "text":
            texts.append(own_text(part, where))
        elif kind == "result":
            if texts:
                yield {"role": role, "content": "".join(texts), **rest}
                texts = []
            yield _result(part, where)
        else:
            said = "a tool call" if kind == "call" else kind
            raise Rejected("only an assistant message can have reasoning or tool calls", f"{where} has {said}")
    if texts:
        yield {"role": role, "content": "".join(texts), **rest}


def _reply(role: Any, parts: list[tuple[Kind, Raw]], rest: Raw, where: str) -> Raw:
    """A reply: reasoning, then texts, then calls. Parts that are marked as not to be learnt become spans."""
    if any(kind == "result" for kind, _ in parts):
        raise Rejected(OTHER_PART, f"{where}, a reply, has a tool's result")
    order = [("reasoning", "text", "call").index(kind) for kind, _ in parts]
    if order != sorted(order):
        said = ", ".join(kind for kind, _ in parts[:8])
        raise Rejected(KIND, f"{where} has {said}; reasoning comes first, calls come last")
    read: Raw = {"role": role, **rest}
    spans: list[dict[str, Any]] = []
    content = ""
    for kind, part in parts:
        if kind == "text":
            text = own_text(part, where)
            learnt = is_learnt(part, where)
            spans.append({"begin": len(content), "end": len(content) + len(text), "train": learnt})
            content += text
        elif not is_learnt(part, where):
            raise Rejected(
                "a mark on a part that is no text", f"{where}: mark the whole message, or a part of its text"
            )
    read["content"] = content
    if any(not span["train"] for span in spans):
        read["train_spans"] = [span for span in spans if span["begin"] < span["end"]]
    reasoning = [_reasoning(part, where) for kind, part in parts if kind == "reasoning"]
    if "".join(reasoning).strip():
        read["reasoning_content"] = "\n\n".join(text for text in reasoning if text.strip())
    calls = [_call(part, where) for kind, part in parts if kind == "call"]
    if calls:
        if read.get("tool_calls") and len(read["tool_calls"]) != len(calls):
            raise Rejected("broken tool call", f"{where} has other calls in its content than in tool_calls")
        read["tool_calls"] = read.get("tool_calls") or calls
    return read


def own_text(part: Mapping[str, Any], where: str) -> str:
    """The text of a part that is one. Raises Rejected where it has none."""
    text = part.get("text")
    if isinstance(text, str):
        return text
    if "text" not in part:
        keys = ", ".join(str(key)[:40] for key in list(part)[:8])
        raise Rejected("content is not text", f"{where}: a text part has no key 'text'; its keys are {keys}")
    raise Rejected("content is not text", f"{where}: a text part holds {json_type(text)}")


def _reasoning(part: Raw, where: str) -> str:
    value = next((part[key] for key in ("thinking", "reasoning", "reasoningText", "text") if key in part), None)
    value = value.get("text") if isinstance(value, dict) else value
    return _text(value, where, "")


def _text(value: Any, where: str, between: str) -> str:
    """A text, or the texts of several parts."""
    if isinstance(value, list):
        return between.join(
            [own_text(part, where) if isinstance(part, dict) else _text(part, where, "") for part in value]
        )
    if not isinstance(value, str):
        raise Rejected("content is not text", f"{where}: its reasoning is {json_type(value)}")
    return value


def _call(part: Raw, where: str) -> Raw:
    """A call in OpenAI's form."""
    name = next((part[key] for key in NAMES if key in part), None)
    arguments = next((part[key] for key in ARGUMENTS if part.get(key) is not None), {})
    identity = next((part[key] for key in ("call_id", *CALL_IDS) if part.get(key)), None)
    call: Raw = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if identity is None else {**call, "id": identity}


def _result(part: Raw, where: str) -> Raw:
    """A tool's result as a message."""
    value = next((part[key] for key in RESULTS if part.get(key) is not None), "")
    read: Raw = {"role": "tool", "content": _result_text(value, where)}
    name = next((part[key] for key in NAMES if part.get(key)), None)
    identity = next((part[key] for key in ANSWERED if part.get(key)), None)
    return read | ({} if name is None else {"name": name}) | ({} if identity is None else {"tool_call_id": identity})


def _result_text(value: Any, where: str) -> str:
    """What a tool gave, as text: of parts their texts, of other JSON its text."""
    if isinstance(value, str):
        return value
    if (
        isinstance(value, dict)
        and value.get("type") in ("text", "json", "error-text", "error-json")
        and "value" in value
    ):
        return _result_text(value["value"], where)  # Vercel's
    if isinstance(value, list) and value and all(map(_is_part, value)):
        return "".join([_result_part(part, where) for part in value])
    return as_json(value, where)


def _result_part(part: Raw, where: str) -> str:
    if _is_json_part(part):
        return as_json(part["json"], where)
    kind, found = kind_of_part(part, where)
    if kind != "text":
        raise Rejected(OTHER_PART, f"{where}: a tool's result has a part that is no text ({kind})")
    return own_text(found, where)


def _is_part(value: Any) -> bool:
    """Whether a value is a content part rather than data."""
    if not isinstance(value, dict):
        return False
    kind = value.get("type")
    typed = isinstance(kind, str) and (kind in KINDS or kind in value or MEDIA_PARTS.fullmatch(kind) is not None)
    return typed or _is_json_part(value) or (len(value) == 1 and not value.keys().isdisjoint(KEYED_PARTS))


def _is_json_part(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {"json"}


def as_json(value: Any, where: str) -> str:
    """A value as JSON. Raises Rejected."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        raise Rejected("content is not text", f"{where} is nested too deep") from None


def _marks(part: Mapping[str, Any]) -> Raw:
    return {key: value for key, value in part.items() if key in MESSAGE_MARKS and value is not None}


def _tools(tool: Any) -> Iterator[Any]:
    if not isinstance(tool, dict):
        yield tool
        return
    declared = next((tool[key] for key in ("functionDeclarations", "function_declarations") if tool.get(key)), None)
    if isinstance(declared, list):
        others = [
            key for key, value in tool.items() if value and key not in ("functionDeclarations", "function_declarations")
        ]
        if others:
            raise Rejected("tools are not a list of definitions", f"'{str(others[0])[:40]}' is no function")
        yield from (_definition(one, schema_types=True) for one in declared)
    elif isinstance(tool.get("toolSpec"), dict):
        yield _definition(tool["toolSpec"])
    else:
        yield _definition(tool)


def _definition(tool: Any, schema_types: bool = False) -> Any:
    """A bare definition with name, description and parameters; one of OpenAI's with `function` as it is."""
    if not isinstance(tool, dict) or isinstance(tool.get("function"), dict):
        return tool
    kind = tool.get("type")
    schema_key = next(
        (
            key
            for key in ("input_schema", "inputSchema", "parametersJsonSchema", "parameters_json_schema")
            if key in tool
        ),
        None,
    )
    if kind not in (None, "", "function") and not (kind == "custom" and schema_key):
        raise Rejected("tools are not a list of definitions", f"a tool of the type '{str(kind)[:40]}' is no function")
    found = {key: value for key, value in tool.items() if key not in ("type", schema_key)}
    if schema_key:
        schema = tool[schema_key]
        nested = schema.get("json") if schema_key == "inputSchema" and isinstance(schema, dict) else None
        found["parameters"] = nested if isinstance(nested, dict) and "type" not in schema else schema
    if schema_types and "parameters" in found:
        found["parameters"] = _json_schema(found["parameters"])
    return found


def _json_schema(schema: Any) -> Any:
    """Gemini's schema, whose types are in capitals, in JSON Schema's letters."""
    if isinstance(schema, list):
        return [_json_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found: Raw = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            found[key] = value.lower()
        elif key in ("properties", "$defs", "defs") and isinstance(value, dict):
            found[key] = {name: _json_schema(one) for name, one in value.items()}
        elif key in ("items", "anyOf", "any_of", "prefixItems", "additionalProperties"):
            found[key] = _json_schema(value)
        else:
            found[key] = value
    return found
