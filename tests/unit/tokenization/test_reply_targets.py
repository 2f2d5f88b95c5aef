"""A reply as generation sees it."""

import pytest

from adder.tokenization.chat_template import ChatTemplate, UnusableRow
from adder.tokenization.control_tokens import ControlTokens
from adder.tokenization.reply_targets import ReplyTargets
from chat_families import conversation
from conversation_cases import reply, user
from family_templates import COMMAND_R7B, DEEPSEEK_V31, HERMES, MISTRAL_V03
from template_matrix import CASES, TOOLS, tokenizer_for, trl_templates


def target(source: str, messages, tools=None, eos=()):
    tokenizer = tokenizer_for(source)
    eos_ids = [tokenizer.convert_tokens_to_ids(token) for token in eos]
    return ReplyTargets(ChatTemplate(tokenizer), ControlTokens(tokenizer), eos_ids).target(messages, tools)


def test_a_reply_is_put_behind_the_prompt_where_the_finished_conversation_lacks_something():
    found = target(MISTRAL_V03, conversation("a?", "A.", system="Be brief."))
    assert found.prompt == "<|endoftext|>[INST] Be brief.\n\na?[/INST]" and found.reply == " A.<|eos|>"
    assert found.composed
    found = target(HERMES, CASES["tools"]["tool"], TOOLS)
    assert found.prompt.endswith("</tool_response><|im_end|><|im_start|>assistant\n")
    assert found.reply == "Yes, umbrella.<|im_end|>"


def test_reasoning_behind_a_prompt_that_closes_it_is_refused():
    assert target(DEEPSEEK_V31, conversation("a?", "A.")).reply == "A.<|eos|>"
    with pytest.raises(UnusableRow, match="template_variables"):
        target(DEEPSEEK_V31, [user("a?"), reply("A.", reasoning_content="Hm.")])
    opened = "{%- set thinking = true %}" + DEEPSEEK_V31
    found = target(opened, [user("a?"), reply("A.", reasoning_content="Hm.")])
    assert found.prompt.endswith("<think>") and found.reply == "Hm.</think>A.<|eos|>"


def test_a_mark_that_an_earlier_turn_has_too_is_not_taken_for_the_prompts():
    ends = ["<|END_OF_TURN_TOKEN|>"]
    found = target(COMMAND_R7B, CASES["tools"]["tool_json"], TOOLS, ends)
    assert found.prompt.endswith("assistant: <|START_THINKING|><|END_THINKING|>")
    assert found.reply == "<|START_RESPONSE|>Yes, umbrella.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    thinking = "{%- set enable_thinking = true %}" + COMMAND_R7B
    found = target(thinking, [user("a?"), reply("A.", reasoning_content="Hm.")], eos=ends)
    assert found.prompt.endswith("<|START_THINKING|>")
    assert found.reply == "Hm.<|END_THINKING|><|START_RESPONSE|>A.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


def test_a_prompt_that_goes_on_with_the_reply_before_is_none():
    """Hy3 opens no second reply, and ends the first only where something follows."""
    said = [user("a?"), reply("A."), reply("B.")]
    assert target(HERMES, said).prompt.endswith("A.<|im_end|>\n<|im_start|>assistant\n")
    unopened = HERMES.replace("{%- if add_generation_prompt %}", "{%- if messages[-1].role != 'assistant' %}")
    ended = "message.content + ('' if loop.last else '<|im_end|>\\n')"
    with pytest.raises(UnusableRow, match="gives no prompt for a reply"):
        target(unopened.replace("message.content + '<|im_end|>\\n'", ended), said)


def test_the_next_turns_own_token_ends_a_turn_that_nothing_else_ends():
    source = trl_templates()["glm4moe"].read_text()
    assert target(source, conversation("a?", "A.")).reply.endswith("A.<|user|>")
    assert target(source, CASES["tools"]["tool"][:2], TOOLS).reply.endswith("</tool_call><|observation|>")


def test_a_token_that_begins_any_turn_ends_one_only_where_generation_stops_on_it():
    source = HERMES.replace("message.content + '<|im_end|>\\n'", "message.content")
    with pytest.raises(UnusableRow, match="no end-of-turn token"):
        target(source, conversation("a?", "A."))
    assert target(source, conversation("a?", "A."), eos=["<|im_start|>"]).reply == "A.<|im_start|>"


def test_a_conversation_that_the_template_gives_no_prompt_for_is_refused():
    source = "{{ raise_exception('x') if add_generation_prompt }}" + HERMES
    with pytest.raises(UnusableRow, match="gives no prompt"):
        target(source, conversation("a?", "A."))


def test_an_end_of_turn_that_is_written_only_when_the_conversation_goes_on_is_learnt():
    ended = "message.content + ('' if loop.last and not add_generation_prompt else '<|im_end|>\\n')"
    source = HERMES.replace("message.content + '<|im_end|>\\n'", ended)  # Qwen 1.5
    assert target(source, conversation("a?", "A.")).reply == "A.<|im_end|>"
