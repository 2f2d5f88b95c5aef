"""Token ids and labels: loss on replies and their ends of turn; before them stands the prompt that generation sees."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from adder.core.labels import IGNORE_INDEX
from adder.tokenization.chat_template import UnusableRow, choose_template
from adder.tokenization.labels import Labeller
from adder.tokenization.run import load_tokenizer
from chat_families import (
    FAMILIES,
    VICUNA,
    bos_adding,
    conversation,
    label,
    label_all,
    labelled_text,
    prompt_ids,
    rstrip_tokenizer,
    sentencepiece_like_tokenizer,
)
from conversation_cases import (
    conversations,
    expected_replies,
    holds_control_token,
    usable,
)
from examples import examples
from template_matrix import runs


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen_think"])
@examples(60, HealthCheck.function_scoped_fixture)
@given(messages=conversations())
def test_labelled_tokens_are_the_replies_and_their_ends_of_turn(labellers, name, messages):
    labeller, family = labellers[name], FAMILIES[name]
    result = label_all(labeller, messages)
    if holds_control_token(labeller, messages):
        assert "reads as a control token" in result
        return
    assume(all(message["content"].strip() for message in messages))
    assert not isinstance(result, str), result
    written = []
    for example in result:
        ids, labels = example.ids, example.labels
        assert np.array_equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
        for start, end in runs(labels.tolist(), example.replies):
            written.append(labeller.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
    assert sorted(written) == sorted(expected_replies(family, messages))


@pytest.mark.parametrize("name", FAMILIES)
@examples(40, HealthCheck.function_scoped_fixture)
@given(messages=conversations())
def test_tokens_before_a_reply_are_the_prompt_that_generation_is_given(labellers, name, messages):
    labeller = labellers[name]
    assume(usable(labeller, messages) and not any("</think>" in message["content"] for message in messages))
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [prompt_ids(labeller.tokenizer, messages[:turn]) for turn in turns]
    found = [
        example.ids[:start].tolist()
        for example in label_all(labeller, messages)
        for start, _ in runs(example.labels.tolist(), example.replies)
    ]
    assert sorted(found) == sorted(prompts)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "vicuna"])
def test_the_whole_text_is_tokenised_as_apply_chat_template_does(labellers, name):
    messages = conversation("Where is it?", "On its way.", "Sure?", "Yes 🎉", system="Be brief.")
    ids = label(labellers[name], messages)[0]
    taken = [labellers[name].finder.template.taken(message) for message in messages]
    expected = labellers[name].tokenizer.apply_chat_template(taken, return_dict=False)
    assert ids.tolist() == expected


def test_the_newline_after_the_end_of_turn_bears_no_loss(labellers):
    labeller = labellers["chatml"]
    ids, labels, _ = label(labeller, conversation("Hi", "Hello", "Bye", "Ciao"))
    newline = labeller.backend.encode("\n", add_special_tokens=False).ids
    assert ids[-1:].tolist() == newline and labels[-1] == IGNORE_INDEX
    assert labels[-2] == labeller.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_bos_stands_exactly_once(labellers, name):
    labeller = labellers[name]
    ids = label(labeller, conversation("Hi", "Hello", "Bye", "Ciao", system="Be brief."))[0]
    assert ids[0] == labeller.tokenizer.bos_token_id and (ids == ids[0]).sum() == 1


def test_a_template_that_writes_bos_twice_is_refused():
    tokenizer = FAMILIES["llama3"].tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert "twice" in label(Labeller(tokenizer), conversation("Hi", "Hello"))


def test_unusable_rows_stay_apart_from_the_usable_ones_around_them(labellers):
    turns = (["a?"], ["b?", "B."], ["c?", ""], ["d?", "\nD."], ["e?", "E."])
    results = labellers["chatml"].label([{"messages": conversation(*contents)} for contents in turns])
    assert [isinstance(result, UnusableRow) for result in results] == [True, False, True, False, False]
    written = [labelled_text(labellers["chatml"].tokenizer, results[number][0].labels) for number in (1, 3, 4)]
    assert written == ["B.<|im_end|>", "\nD.<|im_end|>", "E.<|im_end|>"]


def test_a_token_that_straddles_the_prompts_end_is_cut():
    vicuna = (FAMILIES["vicuna"].tokenizer(), "is four."), (sentencepiece_like_tokenizer(VICUNA), "Yes it is.")
    for tokenizer, reply in vicuna:
        labeller = Labeller(tokenizer)
        messages = conversation("Where is the kettle?", reply)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = prompt_ids(tokenizer, messages[:1])
        assert whole[: len(prompt)] != prompt  # else this tests nothing: " Yes" must be one token
        ids, labels, _ = label(labeller, messages)
        assert ids[: len(prompt)].tolist() == prompt and (labels[: len(prompt)] == IGNORE_INDEX).all()
        assert labelled_text(tokenizer, labels) == reply + "</s>"
        assert labeller.cut == 1


def test_a_control_token_that_swallows_white_space_leaves_the_replys_own():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer = rstrip_tokenizer(template, "<|assistant|>")
    for reply in ("A.", "\n  A."):
        messages = conversation("a?", reply)
        ids, labels, _ = label(Labeller(tokenizer), messages)
        prompt = prompt_ids(tokenizer, messages[:1])
        assert ids[: len(prompt)].tolist() == prompt
        assert labelled_text(tokenizer, labels) == reply + "<|im_end|>"


def test_characters_without_tokens_are_refused_not_dropped():
    tokenizer = sentencepiece_like_tokenizer(VICUNA)
    assert "é" in labelled_text(tokenizer, label(Labeller(tokenizer), conversation("a?", "né 🎉"))[1])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["byte_fallback"] = False
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", eos_token="</s>"
    )
    bare.chat_template = "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    assert "'é' (U+00E9)" in label(Labeller(bare), conversation("a?", "né 🎉"))
    assert not isinstance(label(Labeller(bare), conversation("é?", "ne")), str)  # the prompt is only read


def test_plain_texts_carry_loss_on_all_of_them_and_end(labellers):
    labeller = labellers["chatml"]
    texts = [{"text": "My order has arrived."}, {"messages": conversation("a?", "A.")}, {"text": " "}]
    found = [one if isinstance(one, UnusableRow) else one[0] for one in labeller.label(texts)]
    assert labeller.tokenizer.decode(found[0].ids) == "My order has arrived.<|im_end|>"
    assert np.array_equal(found[0].ids, found[0].labels) and found[0].replies == []
    assert labelled_text(labeller.tokenizer, found[1].labels) == "A.<|im_end|>"
    assert str(found[2]) == "empty text"


def test_plain_texts_begin_once_and_end_once():
    tokenizer = bos_adding(sentencepiece_like_tokenizer(None))
    choose_template(tokenizer, None)
    texts = ["Yes it is.", "<s>Yes it is.", "Yes it is.</s>"]
    for (found,) in Labeller(tokenizer).label([{"text": text} for text in texts]):
        assert (found.ids == tokenizer.bos_token_id).sum() == (found.ids == tokenizer.eos_token_id).sum() == 1
        assert found.ids[0] == tokenizer.bos_token_id and found.ids[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_the_embedded_models_tokenizer(embedded_model_dir):

    tokenizer = load_tokenizer(embedded_model_dir)
    assert choose_template(tokenizer, None) == "own"
    labeller = Labeller(tokenizer)

    @examples(80)
    @given(conversations())
    def check(messages):
        assume(usable(labeller, messages))
        result = label_all(labeller, messages)
        if isinstance(result, str):  # its vocabulary lacks a few control characters and what lies beyond U+40000
            assert "has no tokens for" in result
            replies = "".join(message["content"] for message in messages if message["role"] == "assistant")
            assert any(ord(char) < 32 or ord(char) >= 0x40000 for char in replies)
            return
        # "assistant\n" and a reply's own first newline are one token: cut there, and each reply is an example then.
        written, before = [], []
        for example in result:
            for start, end in runs(example.labels.tolist(), example.replies):
                written.append(tokenizer.decode(example.ids[start:end], clean_up_tokenization_spaces=False))
                before.append(example.ids[:start].tolist())
        assert sorted(written) == sorted(expected_replies(FAMILIES["chatml"], messages))
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        assert sorted(before) == sorted(prompt_ids(tokenizer, messages[:turn]) for turn in turns)

    check()


MARKED = "Alpha beta gamma delta."


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_a_reply_that_are_not_to_be_learnt_carry_no_loss(name, loss_on):
    labeller = Labeller(FAMILIES[name].tokenizer(), loss_on)

    def learnt(*parts, content=MARKED):
        spans = [(content.index(part), content.index(part) + len(part)) for part in parts]
        messages = [*conversation("q", content), *conversation("r", "s")]
        messages[1] = {**messages[1], "unlearnt": spans}
        found, usual = (
            label_all(labeller, turns) for turns in (messages, [*conversation("q", content), *conversation("r", "s")])
        )
        ids, labels, plain, before = (
            np.concatenate([getattr(one, name) for one in examples])
            for examples, name in ((found, "ids"), (found, "labels"), (usual, "ids"), (usual, "labels"))
        )
        assert np.array_equal(ids, plain) and set(labels) <= {*before, IGNORE_INDEX}
        gone = labeller.tokenizer.decode(ids[labels != before], clean_up_tokenization_spaces=False)
        return labelled_text(labeller.tokenizer, labels), gone

    kept, gone = learnt("beta gamma")
    assert "Alpha" in kept and "delta." in kept and "beta" not in kept and "gamma" not in kept
    assert "beta" in gone and "gamma" in gone and "Alpha" not in gone and "delta" not in gone
    kept, gone = learnt("Alpha", "gamma delta.")
    assert "beta" in kept and "Alpha" not in kept and "gamma" not in kept and "delta" not in kept
    assert "Alpha" not in learnt("Alpha", content=f"  {MARKED}")[0]


def test_the_end_of_turn_is_learnt_with_the_end_of_the_reply(labellers):
    labeller = labellers["chatml"]

    def learnt(start, end):
        messages = [*conversation("q"), {"role": "assistant", "content": MARKED, "unlearnt": [(start, end)]}]
        return labelled_text(labeller.tokenizer, label(labeller, messages)[1])

    assert learnt(0, len("Alpha beta gamma")).strip() == "delta.<|im_end|>"
    assert learnt(len("Alpha "), len(MARKED)).strip() == "Alpha"


def test_a_reply_whose_parts_cannot_be_told_apart_is_refused(labellers):
    reply = {"role": "assistant", "content": "Add.", "reasoning_content": "Add.", "unlearnt": [(0, 2)]}
    found = label(labellers["chatml"], [*conversation("q"), reply])
    assert "can't tell where the chat template writes the parts" in found
