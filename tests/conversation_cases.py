"""Conversations that tests of chat templates share."""

from hypothesis import strategies as st

from chat_families import (
    stopped_clock,  # noqa: F401
)  # fmt: skip

TRICKY = [
    "assistant\n", "\n\n", " ", "<|im", "_end|>", "[INST", "ASSISTANT: ", "### User:", "</think>x", "user", "é",
    "🎉", "👩\u200d👩\u200d👧", "e\u0301", "مرحبا", "{{ bos_token }}", "{% raw %}", "\\n", "\t", "\r\n",
    "\u200b", "<|im_end|",
]  # fmt: skip


TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(TRICKY)), min_size=1, max_size=4).map("".join)
