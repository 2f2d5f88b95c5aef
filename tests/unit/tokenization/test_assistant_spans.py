"""Where the replies stand: found for sure, or refused with a reason."""

import numpy as np
import pytest

from adder.tokenization.labels import Labeller
from chat_families import (
    CHATGLM,
    EOS_LAST,
    FAMILIES,
    MISTRAL_TOOLS,
    TOOLS,
    Family,
    conversation,
    label,
    label_all,
    labelled_text,
    prompt_ids,
    result,
)
from conversation_cases import (
    CONVERSATIONS,
    reply,
    segments,
    user,
)
from tiny import tiny_tokenizer

NO_END = "no end-of-turn token"


@pytest.mark.parametrize("who", [0, 1])
def test_control_tokens_that_someone_typed_are_refused_not_parsed(labellers, who):
    for name, typed in (("chatml", "<|im_end|>"), ("mistral", "[INST]"), ("llama3", "<|eot_id|>")):
        contents = ["Hello", "Hello"]
        contents[who] = f"see {typed}\nuser"
        reason = label(labellers[name], conversation(*contents))
        assert typed in reason and f"message {who + 1}" in reason


def test_a_reply_whose_reasoning_is_dropped_later_is_learnt_in_a_text_of_its_own(labellers):
    labeller = labellers["qwen_think"]
    messages = conversation("a?", "<think>\nhm\n</think>\n\nA.", "b?", "<think>\nho\n</think>\n\nB.")
    last, first = label_all(labeller, messages)
    assert labelled_text(labeller.tokenizer, last.labels) == "<think>\nho\n</think>\n\nB.<|im_end|>"
    assert labelled_text(labeller.tokenizer, first.labels) == "<think>\nhm\n</think>\n\nA.<|im_end|>"
    assert "hm" not in labeller.tokenizer.decode(last.ids)  # as generation sees the second turn
    (whole,) = Labeller(labeller.tokenizer, "last").label([{"messages": messages}])[0]
    assert np.array_equal(whole.ids, last.ids) and np.array_equal(whole.labels, last.labels)
    batch, _ = labeller.label_batch([{"messages": messages}], split=False)
    assert np.array_equal(batch.labels, last.labels)


def test_what_the_template_adds_after_the_prompt_must_be_learnt(labellers):
    # Generation is given "<|im_start|>assistant\n" and nothing more, so the model must write the empty block itself.
    labels = label(labellers["qwen_think"], conversation("a?", "A."))[1]
    assert labelled_text(labellers["qwen_think"].tokenizer, labels) == "<think>\n\n</think>\n\nA.<|im_end|>"


def test_a_system_prompt_that_moves_to_the_last_user_turn(labellers):
    labeller = labellers["mistral"]
    last, first = label_all(labeller, conversation("a?", "A.", "b?", "B.", system="Be brief."))
    assert labelled_text(labeller.tokenizer, last.labels) == " B.</s>"
    assert labeller.tokenizer.decode(last.ids) == "<s>[INST] a?[/INST] A.</s>[INST] Be brief.\n\nb?[/INST] B.</s>"
    assert labelled_text(labeller.tokenizer, first.labels) == " A.</s>"
    assert labeller.tokenizer.decode(first.ids) == "<s>[INST] Be brief.\n\na?[/INST] A.</s>"


def test_a_block_of_reasoning_that_only_the_prompt_opens_is_closed_in_the_reply():
    tokenizer = tiny_tokenizer()  # DeepSeek R1: the prompt opens a reasoning block, finished replies have none
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    assert "<think>" in tokenizer.chat_template
    labeller = Labeller(tokenizer)
    assert labelled_text(tokenizer, label(labeller, conversation("a?", "A."))[1]) == "\n</think>\n\nA.<|im_end|>"
    messages = [user("a?"), reply("A.", reasoning_content="Hm.")]
    ids, labels, _ = label(labeller, messages)
    assert labelled_text(tokenizer, labels) == "Hm.\n</think>\n\nA.<|im_end|>"
    assert tokenizer.decode(ids).rstrip().endswith("assistant\n<think>\nHm.\n</think>\n\nA.<|im_end|>")


def test_a_prompt_that_the_finished_reply_does_not_share_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\nSure: ' }}{% endif"
    )
    reason = label(Labeller(tokenizer), conversation("a?", "A."))
    assert "'assistant\\nSure: '" in reason and "another prompt than it is given" in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("message['content'] + '<|im_end|>\n'", "message['content'] + '\n'"), "no end-of-turn token"),
        (("message['content']", "message['content'] | upper"), "rewrites a reply's text"),
        (("message['content']", "message['content'] + message['content']"), "writes a reply 2 times"),
        (("message['content']", "(message['content'] | replace('e', '3'))"), "rewrites a reply's text"),
        (("message['content']", "message['text']"), "refuses this conversation|writes a reply 0 times"),
    ],
)
def test_replies_that_cannot_be_located_for_sure_are_refused(change, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(*change)
    found = label(Labeller(tokenizer), conversation("where?", "here, see"))
    assert isinstance(found, str)
    assert any(part in found for part in reason.split("|")), found


def test_conversations_that_a_template_refuses_keep_its_reason(labellers):
    messages = [*conversation("a?", "A."), {"role": "assistant", "content": "B."}]
    assert "roles must alternate" in label(labellers["gemma"], messages)
    assert label(labellers["chatml"], conversation("a?")) == "no assistant turn"
    assert label(labellers["chatml"], conversation("a?", " \n")) == "empty reply"


def test_loss_on_the_last_reply_only():
    for name in ("chatml", "mistral", "marked_wide", "vicuna"):
        labeller = Labeller(FAMILIES[name].tokenizer(), "last")
        _, labels, replies = label(labeller, conversation("a?", "A.", "b?", "B."))
        assert labelled_text(labeller.tokenizer, labels) == FAMILIES[name].before + "B." + FAMILIES[name].end
        assert len(replies) == 1


def test_loss_on_everything_takes_in_control_tokens_and_what_follows_the_end():
    labeller = Labeller(FAMILIES["chatml"].tokenizer(), "all")
    ids, labels, replies = label(labeller, conversation("a?", "A.", "b?", "B."))
    assert np.array_equal(ids, labels) and len(replies) == 2


@pytest.mark.parametrize("name", ["chatml", "llama3", "marked_wide", "vicuna"])
def test_replies_marked_as_not_to_be_trained_on_carry_no_loss(name):
    family = FAMILIES[name]
    messages = conversation("a?", "A.", "b?", "B.")
    messages[1]["train"] = False
    labeller = Labeller(family.tokenizer())
    ids, labels, replies = label(labeller, messages)
    assert labelled_text(labeller.tokenizer, labels) == "B." + family.end and len(replies) == 1
    whole = label(labeller, conversation("a?", "A.", "b?", "B."))[0]
    assert np.array_equal(ids, whole)  # the mark itself is written nowhere
    everything = Labeller(family.tokenizer(), "all")
    kept = labelled_text(everything.tokenizer, label(everything, messages)[1])
    assert "A." not in kept and "a?" in kept and "b?" in kept and "B." in kept
    messages[3]["train"] = False
    assert "nothing to train on" in label(labeller, messages)
    assert "its last reply is marked" in label(Labeller(family.tokenizer(), "last"), messages)


def mistral_tools():
    return Family(
        MISTRAL_TOOLS,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), bos="<s>", eos="</s>", end="</s>",
    ).tokenizer()  # fmt: skip


def test_tool_calls_of_a_template_that_moves_the_tools_to_the_last_user_turn():
    tokenizer = mistral_tools()
    labeller = Labeller(tokenizer)
    messages = CONVERSATIONS["tool_last"]
    last, first = label_all(labeller, messages, TOOLS)  # the tools stand before the last question of the time
    arguments = '"arguments": {"city": "%s", "days": 2}, "id": "call00001"}]</s>'
    assert [text for _, text in segments(tokenizer, first.labels, first.ids)] == [
        '[TOOL_CALLS] [{"name": "get_weather", ' + arguments % "Paris",
        " Yes, there.</s>",
    ]
    call = '[TOOL_CALLS] [{"name": "get_weather", ' + arguments % "Rome"
    assert [text for _, text in segments(tokenizer, last.labels, last.ids)] == [call]
    prompt = prompt_ids(tokenizer, messages[:5], TOOLS)
    assert last.ids[: len(prompt)].tolist() == prompt
    messages = [user("Rain?"), reply("", "Paris")]
    messages[1]["tool_calls"][0]["id"] = "call_1"
    assert "length 9" in label(labeller, messages, TOOLS)


def test_tools_and_messages_that_a_template_leaves_out_are_refused():
    labeller = Labeller(FAMILIES["deepseek"].tokenizer())
    assert "no place for the list of tools" in label(labeller, CONVERSATIONS["single"], TOOLS)
    # DEEPSEEK writes user, assistant and system messages only.
    messages = [user("Rain?"), reply("I'll look."), result("12 mm"), reply("Yes.")]
    assert "leaves out or rewrites message 3 (tool)" in label(labeller, messages)


def test_control_tokens_in_calls_tools_and_reasoning_are_refused():
    labeller = Labeller(mistral_tools())
    bad = [user("Rain?"), reply("", "Pa[/INST]ris")]
    assert "message 2 (assistant) holds [/INST]" in label(labeller, bad, TOOLS)
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "see </s>"}}]
    assert "the list of tools holds </s>" in label(labeller, [user("Rain?"), reply("", "Paris")], tools)
    reasoning = [user("Rain?"), reply("Yes.", reasoning_content="</s>")]
    assert "message 2 (assistant) holds </s>" in label(labeller, reasoning)


def test_templates_whose_replies_end_in_nothing_are_refused():
    chatglm = Family(CHATGLM, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), eos="<|endoftext|>").tokenizer()
    ids, labels, _ = label(Labeller(chatglm), conversation("a?", "A.", "b?", "B."))
    assert labelled_text(chatglm, labels) == "A.<|user|>B.<|user|>"  # what comes next ends a turn
    assert chatglm.decode(ids).endswith("B.<|user|>")
    chatglm.chat_template = chatglm.chat_template.replace(
        "'<|' + message['role'] + '|>\n'", "'<sop>' + message['role']"
    )
    chatglm.chat_template = chatglm.chat_template.replace("'<|assistant|>\n'", "'<sop>assistant'")
    assert NO_END in label(Labeller(chatglm), conversation("a?", "A."))  # which begins the model's own turns as well
    last = Family(EOS_LAST, eos="<|endoftext|>").tokenizer()
    _, labels, _ = label(Labeller(last), conversation("a?", "A."))
    assert labelled_text(last, labels) == "A.\n<|endoftext|>"
    second, first = label_all(Labeller(last), conversation("a?", "A.", "b?", "B."))
    assert labelled_text(last, first.labels) == "A.\n<|endoftext|>"
    assert labelled_text(last, second.labels) == "B.\n<|endoftext|>"
    _, labels, _ = label(Labeller(last, "last"), conversation("a?", "A.", "b?", "B."))
    assert labelled_text(last, labels) == "B.\n<|endoftext|>"
