"""What later stages are promised of a conversation."""

from adder.formatting.conversation import Conversation, Function, Message, ToolCall
from format_stage import call, read, reply, result, user


def test_conversations_have_the_keys_of_their_types():
    asked = [
        user("q"),
        {**reply(""), "tool_calls": [call("f", {"x": 1}, id="1")], "reasoning": "r", "weight": 0},
        result("r", tool_call_id="1", name="f"),
        reply("ab", train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}]),
    ]
    found = read({"messages": asked, "tools": [{"name": "f"}]})
    assert found.keys() <= Conversation.__annotations__.keys()
    assert {key for message in found["messages"] for key in message} == Message.__annotations__.keys()
    assert all(Message.__required_keys__ <= message.keys() for message in found["messages"])
    (made,) = found["messages"][1]["tool_calls"]
    assert made.keys() == ToolCall.__annotations__.keys() and made["function"].keys() == Function.__required_keys__
    assert read({"text": "t"}).keys() <= Conversation.__annotations__.keys()
