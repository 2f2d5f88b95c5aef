"""Conversations that tests of chat templates share, and what must come of them."""

from typing import cast

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from adder.core.labels import IGNORE_INDEX
from adder.formatting.conversation import Message
from adder.tokenization.chat_template import special_tokens
from adder.tokenization.labels import Labeller
from chat_families import Family, call, conversation, result

TRICKY = [
    "assistant\n", "\n\n", " ", "<|im", "_end|>", "[INST", "ASSISTANT: ", "### User:", "</think>x", "user", "é",
    "🎉", "👩\u200d👩\u200d👧", "e\u0301", "مرحبا", "{{ bos_token }}", "{% raw %}", "\\n", "\t", "\r\n",
    "\u200b", "<|im_end|",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(TRICKY)), min_size=1, max_size=4).map("".join)


@st.composite
def conversations(draw):
    """Conversations of one to three turns, with and without a system message."""
    turns = draw(st.integers(1, 3))
    return conversation(*draw(st.lists(TEXT, min_size=2 * turns, max_size=2 * turns)), system=draw(st.none() | TEXT))


# White space of all kinds, contents that look like marks, the neighbours of the surrogates, no text at all.
ODD = [
    "", " ", "\n", "\t\v\f\r", "\u00a0", "\u2028x\u2029", "\u3000x\u3000", "\x1cx\x1f", "\x85", "\ufeffx",
    "\ud7ff\ue000", "\ufffd", "\x00", "<think>\na\n</think>\n\nb", "<think></think>b", "</think>", "<think>",
    '"', '{"a": [1, "b"]}', "\\", "is four", "1 is", "None", "find_kestrel", "<tool_call>", "{{ x }}", "'s",
    "[THINK]x[/THINK]",
]  # fmt: skip
ODD_TEXT = st.one_of(st.sampled_from(["a", "Yes.", "is four", "é"]), TEXT, st.sampled_from(ODD))
ODD_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats(allow_nan=False, width=16) | ODD_TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(ODD_TEXT, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.one_of(st.sampled_from(["city", "days"]), ODD_TEXT), ODD_VALUES, max_size=3)


@st.composite
def tool_lists(draw):
    """Definitions of one to three tools, with and without descriptions and arguments."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        function = {"name": draw(st.sampled_from(["get_weather", "find_kestrel", "a", "é"]))}
        if draw(st.integers(0, 3)):
            function["description"] = draw(ODD_TEXT)
        if draw(st.integers(0, 3)):
            properties = draw(
                st.dictionaries(
                    st.sampled_from(["city", "days", "a"]),
                    st.fixed_dictionaries({"type": st.just("string")}, optional={"description": ODD_TEXT}),
                    max_size=2,
                )
            )
            function["parameters"] = {"type": "object", "properties": properties, "required": [*properties][:1]}
        found.append({"type": "function", "function": function})
    return found


def _layouts(draw):
    """Roles of a conversation's messages, each with what else the message has."""
    roles = st.sampled_from(["user", "assistant", "system", "tool"])
    usual = st.sampled_from(
        [
            ["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant", "user", "assistant"],
            ["user", "assistant", "tool", "assistant"], ["user", "assistant", "tool", "tool", "assistant"],
            ["system", "user", "assistant", "tool", "assistant", "user", "assistant"], ["user", "assistant", "user"],
        ]
    )  # fmt: skip
    found = []
    names = draw(st.one_of(usual, usual, st.lists(roles, min_size=1, max_size=5)))
    for number, role in enumerate(names):
        more = set()
        if role == "assistant":
            following = names[number + 1 : number + 3]
            calls = following.count("tool") if following[:1] == ["tool"] else draw(st.sampled_from([0] * 9 + [1, 2]))
            more |= {f"{calls} calls"} if calls else set()
            more |= {name for name in ("reasoning", "empty") if draw(st.integers(0, 4)) == 0}
            more |= {name for name in ("untrained", "marked", "trained") if draw(st.integers(0, 7)) == 0}
        found.append((role, more))
    return found


def _filled(draw, layout):
    """A conversation of a layout."""
    messages, calls = [], []
    for role, more in layout:
        message = {"role": role, "content": draw(ODD_TEXT)}
        if role == "tool":
            made = calls.pop(0) if calls else None
            if made:
                message |= {"tool_call_id": made["id"], "name": made["function"]["name"]}
        count = next((int(name[0]) for name in more if name.endswith("calls")), 0)
        if count:
            calls = [call(draw(ODD_TEXT), number=number) for number in range(1, count + 1)]
            for made in calls:
                made["function"] = {
                    "name": draw(st.sampled_from(["get_weather", "a"])), "arguments": draw(ARGUMENTS),
                }  # fmt: skip
            message["tool_calls"] = calls
            calls = [*calls]
            if "empty" in more:
                message["content"] = ""
        if "reasoning" in more:
            message["reasoning_content"] = draw(ODD_TEXT)
        if "untrained" in more:
            message["train"] = False
        elif "trained" in more:
            message["train"] = True
        if "marked" in more and message["content"]:
            ends = sorted(draw(st.lists(st.integers(0, len(message["content"])), min_size=2, max_size=2, unique=True)))
            message["unlearnt"] = [tuple(ends)]
        messages.append(message)
    return messages


@st.composite
def odd_batches(draw, *control):
    """Conversations of a few layouts with all that a message may have, the same layout several times; `control`: texts
    of control tokens, some of which stand in contents."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        layout = _layouts(draw)
        tools = draw(st.lists(tool_lists(), max_size=2))
        for _ in range(draw(st.integers(2, 4))):
            talk = {"messages": _filled(draw, layout)}
            if tools:
                talk["tools"] = draw(st.sampled_from(tools))
            if control and draw(st.integers(0, 9)) == 0:
                one = draw(st.sampled_from(talk["messages"]))
                kept = {name for name in ("content", "reasoning_content", "name", "tool_call_id") if name in one}
                one[draw(st.sampled_from(sorted(kept)))] += draw(st.sampled_from(control))
            found.append(talk)
    return found


def expected_replies(family: Family, messages: list[Message]) -> list[str]:
    """What must carry loss, reply by reply, as the template writes it."""
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    written = [family.before + (reply.strip() if family.trims else reply) for reply in replies]
    return [reply + family.end for reply in written]


def holds_control_token(labeller: Labeller, messages: list[Message]) -> bool:
    """Whether someone typed a control token, which the pieces above sometimes add up to."""
    return any(token in message["content"] for token in special_tokens(labeller.tokenizer) for message in messages)


def usable(labeller: Labeller, messages: list[Message]) -> bool:
    """Whether the conversation can be trained on."""
    return all(m["content"].strip() for m in messages) and not holds_control_token(labeller, messages)


def reply(content: str, *cities: str, **more: object) -> Message:
    """A reply, with a tool call for each of the cities."""
    calls = [call(city, number=number) for number, city in enumerate(cities, 1)]
    return cast(
        "Message", {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **more}
    )


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


CONVERSATIONS = {
    "single": conversation("Where is it?", "Here, I think."),
    "several": conversation("Where is it?", "Here, I think.", "Sure?", "Yes é🎉"),
    "system": conversation("Where is it?", "Here, I think.", "Sure?", "Yes é🎉", system="Be brief."),
    "reasoning": [
        user("Where is it?"), reply("Here, I think.", reasoning_content="I saw it."),
        user("Sure?"), reply("Yes é🎉", reasoning_content="Look again."),
    ],
    "tool": [user("Rain?"), reply("", "Paris"), result("12 mm"), reply("Yes, there.")],
    "tool_last": [
        user("Rain?"), reply("", "Paris"), result("12 mm"), reply("Yes, there."), user("And there?"), reply("", "Rome"),
    ],
    "tool_reasoning": [
        user("Rain?"), reply("", "Paris", reasoning_content="I must ask."), result("12 mm"),
        reply("Yes, there.", reasoning_content="So it does."),
    ],
    "two_calls": [user("Rain?"), reply("", "Paris", "Rome"), result("12 mm"), result("dry", number=2), reply("Paris.")],
    "text_and_call": [user("Rain?"), reply("Let me see.", "Paris"), result("12 mm"), reply("Yes, there.")],
}  # fmt: skip


def segments(
    tokenizer: PreTrainedTokenizerFast, labels: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
) -> list[tuple[int, str]]:
    """Each run of labelled tokens: its start and its text."""
    bears_loss = np.concatenate([[False], labels != IGNORE_INDEX, [False]])
    borders = np.flatnonzero(bears_loss[1:] != bears_loss[:-1]).reshape(-1, 2)
    return [(start, str(tokenizer.decode(ids[start:end]))) for start, end in borders.tolist()]
