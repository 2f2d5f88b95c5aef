"""Messages out of the ways in which people write them."""

import json

import pytest

from adder.formatting.messages import read_messages, why_not_json
from adder.formatting.rejected import Rejected
from format_stage import (
    call,
    read,
    reply,
    result,
    system,
    user,
)


def messages_of(row, *args, **kwargs):
    return read(row, *args, **kwargs)["messages"]


WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
WEATHER_TOOL = {"type": "function", "function": WEATHER}


@pytest.mark.parametrize(
    "tools", [[WEATHER_TOOL], [WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER_TOOL)], WEATHER]
)
@pytest.mark.parametrize("arguments", [{"city": "Graz"}, '{"city": "Graz"}'])
def test_openai_tool_calls_and_results(tools, arguments):
    asked = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [call("weather", arguments, id="c1")]},
        result("rain", tool_call_id="c1", name="weather"),
        reply("a"),
    ]
    expected = [
        user("q"),
        reply("", tool_calls=[call("weather", {"city": "Graz"}, id="c1")]),
        result("rain", tool_call_id="c1", name="weather"),
        reply("a"),
    ]
    assert read({"messages": asked, "tools": tools}) == {"messages": expected, "tools": [WEATHER_TOOL]}


@pytest.mark.parametrize("tools", [None, "", "[]", [], "null"])
def test_no_tools_are_no_tools(tools):
    assert read({"messages": [user("q"), reply("a")], "tools": tools}) == {"messages": [user("q"), reply("a")]}


def test_the_legacy_function_call_is_a_tool_call():
    asked = [
        user("q"),
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "rain"},
        reply("a"),
    ]
    expected = [user("q"), reply("", tool_calls=[call("weather", {})]), result("rain", name="weather"), reply("a")]
    assert read({"messages": asked, "functions": [WEATHER]}) == {"messages": expected, "tools": [WEATHER_TOOL]}


@pytest.mark.parametrize("tool_role", ["observation", "tool", "function_response"])
@pytest.mark.parametrize("several", [False, True])
def test_sharegpt_tool_roles(tool_role, several):
    """LLaMA-Factory writes a call as JSON in the value of `function_call`, several as a list."""
    one = {"name": "weather", "arguments": {"city": "Graz"}}
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps([one, one] if several else one)},
            {"from": tool_role, "value": "rain"},
            {"from": tool_role, "value": "sun"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([WEATHER]),
    }
    calls = [call("weather", {"city": "Graz"})] * (2 if several else 1)
    messages = [user("q"), reply("", tool_calls=calls), result("rain"), result("sun"), reply("a")]
    assert read(row) == {"messages": messages, "tools": [WEATHER_TOOL]}


def test_a_conversation_may_end_with_a_tool_call_and_say_something_with_it():
    messages = [user("q"), reply("Let me see.", tool_calls=[call("weather", {})])]
    assert messages_of({"messages": messages}) == messages
    bare = [user("q"), {"role": "assistant", "tool_calls": [call("weather", {})]}]
    assert messages_of({"messages": bare}) == [user("q"), reply("", tool_calls=[call("weather", {})])]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_answer(key):
    row = {"messages": [user("q"), {**reply("a"), key: "because"}]}
    assert messages_of(row) == [user("q"), reply("a", reasoning_content="because")]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"masked": True},
        {"loss": False},
        {"loss_weight": 0.0},
        {"loss_scale": 0},
        {"mask": True},
        {"trainable": False},
    ],
)
def test_marks_of_replies_that_are_not_to_be_trained_on(mark):
    row = {"messages": [user("q"), {**reply("a"), **mark}, user("r"), {**reply("b"), "weight": 1}]}
    assert messages_of(row) == [user("q"), reply("a", train=False), user("r"), reply("b")]


def test_what_json_cannot_hold_is_named():
    broken = {"messages": [user("q"), reply("a\ud800")]}
    assert str(why_not_json(broken, TypeError("x"))) == (
        "invalid unicode: assistant message 2 has half a surrogate pair"
    )
    assert "tools" in str(why_not_json({"messages": [user("q")], "tools": ["\udfff"]}, TypeError("x")))
    assert why_not_json({"text": "\udfff"}, TypeError("x")).kind == "invalid unicode"
    assert "64-bit" in str(why_not_json({"messages": [user("q")]}, TypeError("Integer exceeds 64-bit range")))


def test_messages_are_numbered_as_they_stand_in_the_row():
    with pytest.raises(Rejected, match="user message 2"):
        read_messages([system(""), user(""), reply("a")], "messages")
