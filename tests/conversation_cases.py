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
