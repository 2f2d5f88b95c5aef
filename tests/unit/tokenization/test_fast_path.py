"""The fast path gives what the slow path gives."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import family_templates
from adder.tokenization.chat_template import UnusableRow, special_tokens
from adder.tokenization.labels import Batch, Labeller
from chat_families import (
    FAMILIES,
    MISTRAL_TOOLS,
    SPACED,
    TOOLS,
    Family,
    conversation,
    lacking_bytes,
    result,
    rstrip_tokenizer,
    sentencepiece_like_tokenizer,
)
from conversation_cases import TEXT, odd_batches, reply, user
from examples import examples
from template_matrix import tokenizer_for, trl_templates
from tiny import tiny_tokenizer


def phi3():
    template = FAMILIES["phi"].template
    return rstrip_tokenizer(template, "<|assistant|>"), rstrip_tokenizer(template, "<|end|>")


TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
TOKENIZERS |= {"phi3_prompt": phi3()[0], "phi3_end": phi3()[1]}
# Reply and prompt join in one token (" is"), or in one control token.
TOKENIZERS["spaced"] = Family(SPACED).tokenizer()
TOKENIZERS["longer"] = Family(FAMILIES["cohere"].template, (*FAMILIES["cohere"].tokens, "<|resp|>1")).tokenizer()
TOKENIZERS["lacks_bytes"] = lacking_bytes(FAMILIES["chatml"].template)
TOKENIZERS["sentencepiece"] = sentencepiece_like_tokenizer(FAMILIES["mistral"].template)


@st.composite
def batches(draw):
    """Conversations of a few layouts, so that all but the first of each have one to go by."""
    found = []
    for _ in range(draw(st.integers(2, 6))):
        turns = draw(st.integers(1, 2))
        text = st.one_of(TEXT, st.sampled_from(["is four", "1 is", "é"]))
        contents = draw(st.lists(text, min_size=2 * turns, max_size=2 * turns))
        messages = conversation(*contents, system=draw(st.none() | TEXT))
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["train"] = False
        found.append({"messages": messages})
    return found


def both_ways(tokenizer, loss_on, conversations, split=True):
    """What the fast path and the slow path make of conversations: tokens, labels, reasons, and what is counted."""
    found = []
    for fast_path in (True, False):
        labeller = Labeller(tokenizer, loss_on, fast_path)
        batch, rejected = labeller.label_batch(conversations, split)
        arrays = {field.name: getattr(batch, field.name).tolist() for field in fields(Batch)}
        reasons = {row: (str(reason), reason.kind) for row, reason in sorted(rejected.items())}
        contents, template = labeller.finder.contents, labeller.finder.template
        counted = labeller.cut, labeller.split, labeller.unmatched, template.folds_reasoning
        found.append((arrays, reasons, counted, contents.unwritten_of_tools))
    return found


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_path_gives_what_the_slow_path_gives(name, loss_on):
    @examples(25)
    @given(batches(), st.booleans())
    def check(conversations, split):
        fast, slow = both_ways(TOKENIZERS[name], loss_on, conversations, split)
        assert fast == slow

    check()


ODD_TOKENIZERS = {
    **{
        name: TOKENIZERS[name] for name in ("chatml", "llama3", "qwen_think", "mistral", "lacks_bytes", "sentencepiece")
    },
    "mistral_tools": Family(MISTRAL_TOOLS, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>").tokenizer(),
    **{name: tokenizer_for(source) for name, source in family_templates.OWN.items()},
    **{name: tokenizer_for(trl_templates()[file].read_text()) for name, file in family_templates.SHIPPED.items()},
}


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", ODD_TOKENIZERS)
def test_the_fast_path_gives_what_the_slow_path_gives_with_all_that_messages_may_hold(name, loss_on):
    tokenizer = ODD_TOKENIZERS[name]
    control = sorted(special_tokens(tokenizer))

    @examples(6)
    @given(odd_batches(*control), st.booleans())
    def check(conversations, split):
        fast, slow = both_ways(tokenizer, loss_on, conversations, split)
        assert fast == slow

    check()


@pytest.mark.parametrize("beyond", ["", "<|im_end|>", "is four"])
def test_the_fast_path_looks_at_replies_that_no_example_holds(beyond):
    """A template that rewrites what is past ends its only example before a reply that isn't to be learnt."""
    rows = [{"messages": conversation("is four", "0", "is four", last)} for last in ("1", beyond)]
    for row in rows:
        row["messages"][-1]["train"] = False
    fast, slow = (Labeller(TOKENIZERS["qwen_think"], "assistant", fast_path) for fast_path in (True, False))
    assert [str(one) for one in fast.label(rows)] == [str(one) for one in slow.label(rows)]


USUAL = sorted({*FAMILIES} - {"vicuna", "plain"})


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_templates_go_the_fast_path(name):
    labeller = Labeller(TOKENIZERS[name])
    conversations = [
        {"messages": conversation(f"Where is {number}?", "Here é.", "Sure?", "Yes.")} for number in range(9)
    ]
    assert set(labeller.take_fast_path(conversations).rows.tolist()) == set(range(9))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "gptoss", "gemma4_v5"])
def test_reasoning_and_several_examples_of_a_conversation_go_the_fast_path(name):
    tokenizer = tokenizer_for(trl_templates()[name].read_text())
    fast, slow = (Labeller(tokenizer, fast_path=quick) for quick in (True, False))
    talks = []
    for number in range(5):
        talk = conversation(f"Where is {number}?", "Here é.", "Sure?", f"Yes, {number}.")
        for message in talk[1::2]:
            message["reasoning_content"] = f"Look at {number}."
        talks += [{"messages": talk}, {"messages": talk[:2]}]
    assert set(fast.take_fast_path(talks).rows.tolist()) == set(range(10))
    for split in (True, False):
        one, other = fast.label_batch(talks, split)[0], slow.label_batch(talks, split)[0]
        for field in fields(Batch):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


WITH_CALLS = [
    "qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "glm4moe", "gptoss", "gemma4_v5", "lfm2_v2", "nemotron_3_nano",
    "Hermes 2 Pro, Hermes 3", "Command A, Command R7B",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_CALLS)
def test_tools_and_calls_go_the_fast_path(name):
    tokenizer = ODD_TOKENIZERS[name] if name in ODD_TOKENIZERS else tokenizer_for(trl_templates()[name].read_text())
    talks = []
    for number in range(6):
        talk = [user(f"Rain {number}?"), reply("", f"Paris {number}"), result(f"{number} mm"), reply("Yes é.")]
        talk[1]["tool_calls"][0]["function"]["arguments"] |= {"x": [1, {"y": '"'}]} if number % 2 else {}
        talks.append({"messages": talk, "tools": [TOOLS, WIND, TOOLS][number % 3]})
    assert set(Labeller(tokenizer).take_fast_path(talks).rows.tolist()) == set(range(6))
    for split in (True, False):
        fast, slow = both_ways(tokenizer, "assistant", talks, split)
        assert fast == slow and not slow[1]


WIND = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "name": "wind", "description": "How it blows"}}]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "smolvlm"])
def test_replies_that_a_template_does_not_write_behind_its_prompt_go_the_fast_path(name):
    tokenizer = tokenizer_for(trl_templates()[name].read_text())
    talks = [{"messages": conversation(f"{number}?", f"Here é {number}.", "Sure?", "Yes.")} for number in range(5)]
    talks += [{"messages": conversation(f"{number}?", text)} for number, text in enumerate(["</think>a", "think", "b"])]
    fast, slow = both_ways(tokenizer, "assistant", talks)
    assert fast == slow and not slow[1]
    assert {*range(5)} <= set(Labeller(tokenizer).take_fast_path(talks).rows.tolist())


@pytest.mark.parametrize("name", ["vicuna", "plain", "spaced", "OLMo 2", "Mistral 7B v0.1"])
def test_replies_behind_ordinary_words_are_found_without_rendering_their_prompts(name):
    tokenizer = ODD_TOKENIZERS.get(name) or TOKENIZERS[name]
    labeller = Labeller(tokenizer)
    talks = [conversation(f"Where is {number}?", " is é ", "Sure?", f"Yes {number}.") for number in range(3)]
    labeller.label([{"messages": talk} for talk in talks])
    for talk in talks:
        found = labeller.fast_path.find({"messages": talk})
        assert found == labeller.finder.find(talk)
    with pytest.raises(UnusableRow, match="reads as a control token"):
        labeller.fast_path.find({"messages": conversation(f"{tokenizer.eos_token}?", "a", "b", "c")})


@pytest.mark.parametrize("reply", ["你好。", "é", "🎉", "«да»", "مرحبا"])
def test_replies_in_any_script_go_the_fast_path(reply):
    talks = [{"messages": conversation(f"{number}?", reply)} for number in range(3)]
    fast, slow = both_ways(TOKENIZERS["chatml"], "assistant", talks)
    assert fast == slow and len(Labeller(TOKENIZERS["chatml"]).take_fast_path(talks).rows) == 3


def test_what_conversations_begin_with_is_encoded_once():
    tokenizer = tokenizer_for(trl_templates()["qwen2_5"].read_text())
    path, talks = (
        Labeller(tokenizer).fast_path,
        [{"messages": conversation(f"{n}?", "a"), "tools": TOOLS} for n in "123"],
    )
    heads = [(one.head_ids, one.text) for talk in talks for one in path.splice(talk)]
    assert not heads[0][0] and heads[1][0] == heads[2][0]
    whole = Labeller(tokenizer, fast_path=False).label(talks)[2][0].ids.tolist()
    assert heads[2][0] + tokenizer.encode(heads[2][1], add_special_tokens=False) == whole


def test_a_template_that_looks_at_contents_takes_the_slow_path():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +", "('Calm: ' if 'please' in message['content'] else '') + message['content'] +"
    )
    labeller = Labeller(tokenizer)
    conversations = [{"messages": conversation(text, "Yes.")} for text in ("a?", "b, please?", "c?")]
    assert labeller.take_fast_path(conversations).rows.tolist() == [0, 2]
    texts = [tokenizer.decode(found[0].ids) for found in labeller.label(conversations)]
    assert "Calm: b, please?" in texts[1] and "Calm" not in texts[0] + texts[2]
