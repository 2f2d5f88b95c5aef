"""Messages as other APIs take them become those of OpenAI's chat completions, or are refused with what was found."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adder.core.errors import UserError
from adder.data.columnar import parquet_rows
from adder.formatting.api_messages import content_key, is_messages, plain, tools_of
from adder.formatting.rejected import Rejected
from adder.formatting.row_notes import notes_of
from format_stage import call, format_of, read, reply, result, system, user

SCHEMA = {"type": "object", "properties": {"type": {"type": "string", "enum": ["DAY"]}}, "required": ["type"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
BARE = {"name": "weather", "description": "d"}
GEMINI_SCHEMA = {**SCHEMA, "type": "OBJECT", "properties": {"type": {"type": "STRING", "enum": ["DAY"]}}}
ARGUMENTS = {"type": "DAY", "n": None}
TEXTS = ["q", "think", "Let me see. ", "wet", "It rains."]


def conversation(call_id, result_text="wet", reasoning=True, name=None):
    """What each of the forms below says."""
    identity = {} if call_id is None else {"id": call_id}
    answered = {} if call_id is None else {"tool_call_id": call_id}
    named = {} if name is None else {"name": name}
    thought = {"reasoning_content": "think"} if reasoning else {}
    return {
        "messages": [
            system("s"),
            user("q"),
            reply("Let me see. ", tool_calls=[call("weather", ARGUMENTS, **identity)], **thought),
            result(result_text, **named, **answered),
            reply("It rains."),
        ],
        "tools": [TOOL],
    }


def anthropic(result_content):
    return {
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            user([{"type": "text", "text": "q"}]),
            reply(
                [
                    {"type": "thinking", "thinking": "think", "signature": "x"},
                    {"type": "text", "text": "Let me see. "},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": ARGUMENTS},
                ]
            ),
            user([{"type": "tool_result", "tool_use_id": "t1", "content": result_content}]),
            reply("It rains."),
        ],
        "tools": [{**BARE, "input_schema": SCHEMA}],
    }


def gemini(snake):
    called, response = ("function_call", "function_response") if snake else ("functionCall", "functionResponse")
    return {
        "system_instruction" if snake else "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
        "contents": [
            {"role": "user", "parts": [{"text": "q"}]},
            {
                "role": "model",
                "parts": [
                    {"text": "think", "thought": True},
                    {"text": "Let me "},
                    {"text": "see. "},
                    {called: {"name": "weather", "args": ARGUMENTS}},
                ],
            },
            {"role": "function" if snake else "user", "parts": [{response: {"name": "weather", "response": {"a": 1}}}]},
            {"role": "model", "parts": [{"text": "It rains."}]},
        ],
        "tools": [
            {"function_declarations" if snake else "functionDeclarations": [{**BARE, "parameters": GEMINI_SCHEMA}]}
        ],
        "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
    }


RESPONSES = {
    "instructions": "s",
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}],
    "output": [
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "think"}]},
        {
            "type": "message",
            "id": "m",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me see. "}],
        },
        {"type": "function_call", "id": "f", "call_id": "c1", "name": "weather", "arguments": json.dumps(ARGUMENTS)},
        {"type": "function_call_output", "call_id": "c1", "output": "wet"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It rains."}]},
    ],
    "tools": [{"type": "function", **BARE, "parameters": SCHEMA}],
}
BEDROCK = {
    "system": [{"text": "s"}],
    "messages": [
        user([{"text": "q"}]),
        reply(
            [
                {"reasoningContent": {"reasoningText": {"text": "think", "signature": "x"}}},
                {"text": "Let me see. "},
                {"toolUse": {"toolUseId": "b1", "name": "weather", "input": ARGUMENTS}},
            ]
        ),
        user([{"toolResult": {"toolUseId": "b1", "content": [{"json": {"a": 1}}], "status": "success"}}]),
        reply([{"text": "It rains."}]),
    ],
    "toolConfig": {"tools": [{"toolSpec": {**BARE, "inputSchema": {"json": SCHEMA}}}], "toolChoice": {"auto": {}}},
}
COHERE = {
    "messages": [
        {"role": "System", "content": "s"},
        {"role": "User", "content": "q"},
        {
            "role": "Chatbot",
            "tool_plan": "think",
            "content": "Let me see. ",
            "tool_calls": [call("weather", ARGUMENTS)],
        },
        {"role": "Tool", "content": "wet"},
        {"role": "Chatbot", "message": "It rains."},
    ],
    "tools": [TOOL],
}
LANGCHAIN = {
    "messages": [
        {"type": "system", "content": "s"},
        {"type": "human", "data": {"content": "q", "additional_kwargs": {}}},
        {
            "type": "ai",
            "content": "Let me see. ",
            "tool_calls": [{"name": "weather", "args": ARGUMENTS, "id": "l1", "type": "tool_call"}],
        },
        {"type": "tool", "content": "wet", "tool_call_id": "l1"},
        {"type": "ai", "content": "It rains.", "tool_calls": [], "additional_kwargs": {}},
    ],
    "tools": json.dumps([json.dumps({**BARE, "input_schema": SCHEMA})]),
}
VERCEL = {
    "messages": [
        system("s"),
        user("q"),
        reply(
            [
                {"type": "reasoning", "text": "think"},
                {"type": "text", "text": "Let me see. "},
                {"type": "tool-call", "toolCallId": "v1", "toolName": "weather", "input": ARGUMENTS},
            ]
        ),
        result(
            [
                {
                    "type": "tool-result",
                    "toolCallId": "v1",
                    "toolName": "weather",
                    "output": {"type": "text", "value": "wet"},
                }
            ]
        ),
        reply("It rains."),
    ],
    "tools": {"tools": [{**BARE, "inputSchema": SCHEMA}]},
}


FORMS = {
    "anthropic": anthropic("wet"),
    "gemini": gemini(False),
    "gemini-snake": gemini(True),
    "responses": RESPONSES,
    "bedrock": BEDROCK,
    "cohere": COHERE,
    "langchain": LANGCHAIN,
    "vercel": VERCEL,
}
ODD = [None, "", "x", 0, True, 1.5, [], ["x"], {}, {"type": "text"}, [{"text": "y"}], [[]], "[{", "\ud800"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (anthropic("wet"), conversation("t1")),
        (anthropic([{"type": "text", "text": "w"}, {"type": "text", "text": "et"}]), conversation("t1")),
        (gemini(False), conversation(None, '{"a": 1}', name="weather")),
        (gemini(True), conversation(None, '{"a": 1}', name="weather")),
        (RESPONSES, conversation("c1")),
        (BEDROCK, conversation("b1", '{"a": 1}')),
        (COHERE, conversation(None)),
        (LANGCHAIN, conversation("l1", reasoning=False)),
        (VERCEL, conversation("v1", name="weather")),
    ],
    ids=[
        "anthropic",
        "anthropic-parts",
        "gemini",
        "gemini-snake",
        "responses",
        "bedrock",
        "cohere",
        "langchain",
        "vercel",
    ],
)
def test_each_api_s_messages_become_openai_s(row, expected):
    assert read(row) == expected
    assert [note for note in notes_of(row, format_of(row)) if "toolConfig" not in note] == []
    names = [name for name in ("messages", "contents", "tools") if not isinstance(row.get(name, ""), str)]
    cells = {name: json.dumps(row[name]) for name in names}
    assert read({**row, **cells}) == expected


def test_several_results_of_one_message_are_several_messages_and_a_question_may_follow():
    blocks = [
        {"type": "tool_result", "tool_use_id": "1", "content": {"a": 1}},
        {"type": "tool_result", "tool_use_id": "2", "content": [{"name": "x"}], "is_error": True},
        {"type": "text", "text": "And?"},
    ]
    calls = [{"type": "tool_use", "id": str(number), "name": "f", "input": {}} for number in (1, 2)]
    row = {"messages": [user("q"), reply(calls), user(blocks), reply("a")]}
    assert read(row)["messages"][2:5] == [
        result('{"a": 1}', tool_call_id="1"),
        result('[{"name": "x"}]', tool_call_id="2"),
        user("And?"),
    ]
    assert list(notes_of(row, format_of(row))) == ["nothing reads the key 'is_error' of a message's parts"]


def test_parts_of_a_reply_may_be_marked_as_not_to_be_learnt():
    parts = [{"type": "text", "text": "bad. ", "train": False}, {"type": "text", "text": "good."}]
    assert read({"messages": [user("q"), reply(parts)]})["messages"][1] == reply("bad. good.", unlearnt=[(0, 4)])
    parts = [{"text": "x", "weight": 0}]
    with pytest.raises(Rejected, match="no reply to train on"):
        read({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": parts}]})
    with pytest.raises(Rejected, match="a mark on a part that is no text"):
        read({"messages": [user("q"), reply([{"type": "tool_use", "name": "f", "train": False}])]})


def test_items_that_make_one_turn_are_one_reply_and_others_are_several():
    items = [
        user("q"),
        {
            "type": "reasoning",
            "content": [{"type": "reasoning_text", "text": "a"}, {"type": "reasoning_text", "text": "b"}],
        },
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": {"y": 1}},
        {"type": "reasoning", "summary": [], "encrypted_content": "..."},
        {"type": "message", "role": "assistant", "content": "a"},
    ]
    found = list(plain(items))
    assert [number for number, _ in found] == [1, 2, 5, 6, 7]
    assert read({"messages": items})["messages"][1]["reasoning_content"] == "a\n\nb"
    assert [one["function"]["name"] for one in read({"messages": items})["messages"][1]["tool_calls"]] == ["f", "g"]
    assert list(notes_of({"messages": items}, format_of({"messages": items}))) == [
        "nothing reads the key 'encrypted_content' of messages"
    ]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [user("q"), reply([{"type": "tool_use", "name": "f"}, {"type": "text", "text": "a"}])]}, "order"),
        ({"messages": [user("q"), reply([{"type": "redacted_thinking", "data": "x"}])]}, "type 'redacted_thinking'"),
        ({"messages": [user("q"), reply([{"type": "server_tool_use", "name": "f"}])]}, "type 'server_tool_use'"),
        ({"messages": [user([{"type": "tool_use", "name": "f"}]), reply("a")]}, "only an assistant message"),
        ({"messages": [user([{"image": {"format": "png"}}]), reply("a")]}, "keys image"),
        ({"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "keys inlineData"),
        ({"contents": [{"parts": ["q"]}, {"role": "model", "parts": [{"functionCall": {}}]}]}, "a call has no name"),
        ({"input": [user("q")], "output": [{"type": "web_search_call", "id": "w"}]}, "type 'web_search_call'"),
        ({"messages": [user("q"), {**reply("a"), "parts": [{"text": "b"}]}]}, "says two things"),
        ({"contents": "a text"}, "contents is not a list"),
        ({"prompt": [{"text": "q"}, {"text": "r", "speaker": "x"}], "completion": "a"}, "nothing reads speaker"),
        ({"messages": [user("q"), reply("a")], "tools": [{"googleSearch": {}}]}, "tool 1 has no name"),
        ({"messages": [user("q"), reply("a")], "tools": [{"type": "web_search_20250305", "name": "w"}]}, "no function"),
        ({"messages": [user("q"), reply([{"type": "tool_result", "content": "x"}])]}, "a reply, has a tool's result"),
        (
            {"messages": [user("q"), reply([{"type": "tool_use", "id": "1", "name": "f"}]),
                          user([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}])]},
            "type 'image'",
        ),
    ],
)  # fmt: skip
def test_what_has_no_place_in_a_message_is_refused_with_what_was_found(row, kind):
    with pytest.raises(Rejected, match=kind):
        read(row)


def test_where_a_message_says_something():
    assert content_key({"role": "user", "content": "", "parts": [{"text": "a"}]}) == "parts"
    assert content_key({"role": "user", "content": "a", "parts": [{"text": "a"}]}) == "parts"
    assert content_key({"role": "user", "content": None}) == "content"
    assert content_key({"role": "user"}) is None


def test_lists_of_messages_are_told_from_content_parts():
    assert is_messages([{"role": "user", "content": "q"}]) and is_messages([{"type": "human", "content": "q"}])
    assert is_messages(RESPONSES["output"]) and not is_messages([{"type": "text", "text": "q"}])
    assert not is_messages([{"text": "q"}, {"text": "r"}])
    assert not is_messages(["q"]) and not is_messages([]) and not is_messages("q")


def test_tools_without_anything_around_them_stay_as_they_are():
    assert tools_of([TOOL]) == [TOOL] and tools_of("x") == "x" and tools_of([3]) == [3]
    assert tools_of({"functionCallingConfig": {}}) == []


def _damaged(value):
    """The value with each of its parts left out, and with each replaced by each of ODD."""
    yield from ODD
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        rest = [(other, one) for other, one in items if other != key]
        yield dict(rest) if isinstance(value, dict) else [one for _, one in rest]
        for damaged in _damaged(inner):
            changed = {**dict(items), key: damaged}
            yield changed if isinstance(value, dict) else list(changed.values())


@pytest.mark.parametrize("name", FORMS)
def test_damage_at_any_place_is_read_or_refused(name):
    rows = [row for row in _damaged(FORMS[name]) if isinstance(row, dict) and row]
    assert len(rows) > 400
    refused = 0
    for row in rows:
        try:
            source = format_of(row)
            found = read(row)
            list(notes_of(row, source))
        except (Rejected, UserError):
            refused += 1
            continue
        assert all(isinstance(message["content"], str) for message in found["messages"])
        assert all(isinstance(tool["function"]["name"], str) for tool in found.get("tools", []))
    assert 0 < refused < len(rows)


def _with_equal_types(row):
    """The row as a table can hold it: each content a list, and no object without keys."""
    messages = [
        {**one, "content": [{"type": "text", "text": one["content"]}]} if isinstance(one.get("content"), str) else one
        for one in row.get("messages", [])
    ]
    return {**row, **({"messages": messages} if messages else {})}


@pytest.mark.parametrize("name", ["anthropic", "gemini", "gemini-snake", "responses", "cohere", "vercel"])
def test_nulls_that_a_table_fills_into_parts_change_nothing(tmp_path, name):
    row = json.loads(
        json.dumps(_with_equal_types(FORMS[name])).replace(', "n": null', "").replace(', \\"n\\": null', "")
    )
    if name == "vercel":  # whose results are an object
        row["messages"][3]["content"][0]["output"] = "wet"
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    assert [read(one) for one in parquet_rows(tmp_path / "a.parquet", Counter())] == [read(row)] * 2
