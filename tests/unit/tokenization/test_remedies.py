"""Each reason for which a conversation can't be used has something to do about it."""

import pytest

from adder.tokenization.labels import Labeller
from adder.tokenization.remedies import DEFAULT, REMEDIES, remedy
from chat_families import CHATGLM, CHATML_DEFAULT_SYSTEM, GEMMA, Family, conversation, label
from conversation_cases import reply, user
from template_matrix import TOOLS, tokenizer_for, trl_templates

CASES = {
    "refuses this conversation": (GEMMA, [user("a"), user("b"), reply("c")], None),
    "list of tools": (CHATML_DEFAULT_SYSTEM, conversation("a", "b"), TOOLS),
    "tool call": (CHATML_DEFAULT_SYSTEM, [user("a"), reply("", "Paris")], TOOLS),
    "control token": (CHATML_DEFAULT_SYSTEM, conversation("<|im_end|>", "b"), None),
    "end-of-turn token": (CHATGLM, conversation("a", "b"), None),
    "no reasoning can follow": (
        trl_templates()["qwen3_5_nothink"].read_text(), [user("a"), reply("b", reasoning_content="Hm, so.")], None,
    ),
    "empty reply": (CHATML_DEFAULT_SYSTEM, conversation("a", " "), None),
    "no assistant turn": (CHATML_DEFAULT_SYSTEM, conversation("a"), None),
    "nothing to train on": (CHATML_DEFAULT_SYSTEM, [user("a"), reply("b", train=False)], None),
}  # fmt: skip


@pytest.mark.parametrize("part", CASES)
def test_a_reason_that_is_really_given_has_its_own_remedy(part):
    template, messages, tools = CASES[part]
    tokenizer = Family(template).tokenizer() if template == CHATGLM else tokenizer_for(template)
    reason = label(Labeller(tokenizer), messages, tools)
    assert part in reason and remedy(reason) == REMEDIES[part]


def test_whatever_else_is_the_matter_has_one_too():
    assert remedy("the chat template writes a reply 2 times") == DEFAULT
