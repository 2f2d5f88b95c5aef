"""The fast path gives what the slow path gives."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adder.tokenization.chat_template import UnusableRow
from adder.tokenization.labels import Batch, Labeller
from chat_families import (
    FAMILIES,
    SPACED,
    Family,
    conversation,
    lacking_bytes,
    rstrip_tokenizer,
    sentencepiece_like_tokenizer,
)
from conversation_cases import (
    TEXT,
)
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


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_path_gives_what_the_slow_path_gives(name, loss_on):
    fast, slow = (Labeller(TOKENIZERS[name], loss_on, fast_path) for fast_path in (True, False))

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(batches())
    def check(conversations):
        for one, other in zip(fast.label(conversations), slow.label(conversations), strict=True):
            if isinstance(other, UnusableRow):
                assert str(one) == str(other)
                continue
            assert len(one) == len(other)
            for mine, theirs in zip(one, other, strict=True):
                assert np.array_equal(mine.ids, theirs.ids) and np.array_equal(mine.labels, theirs.labels)
                assert mine.replies == theirs.replies

    check()


@pytest.mark.parametrize("beyond", ["", "<|im_end|>", "is four"])
def test_the_fast_path_looks_at_replies_that_no_example_holds(beyond):
    """A template that rewrites what is past ends its only example before a reply that isn't to be learnt."""
    rows = [{"messages": conversation("is four", "0", "is four", last)} for last in ("1", beyond)]
    for row in rows:
        row["messages"][-1]["train"] = False
    fast, slow = (Labeller(TOKENIZERS["qwen_think"], "assistant", fast_path) for fast_path in (True, False))
    assert [str(one) for one in fast.label(rows)] == [str(one) for one in slow.label(rows)]


USUAL = sorted({*FAMILIES} - {"vicuna", "plain", "parts"})


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_templates_go_thetake_fast_path(name):
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
