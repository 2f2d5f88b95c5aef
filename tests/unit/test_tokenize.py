import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from adder.errors import UserError
from adder.files import read_json, read_table, write_table
from adder.progress import Progress
from adder.template import choose_template, special_tokens
from adder.tokenize import Labeller, run
from chat_families import (
    FAMILIES,
    VICUNA,
    Family,
    conversation,
    labelled_text,
    prompt_ids,
    rstrip_tokenizer,
    sentencepiece_like_tokenizer,
    stopped_clock,  # noqa: F401
)  # fmt: skip
from tiny import save_tiny_model, tiny_tokenizer

TRICKY = [
    "assistant\n", "\n\n", " ", "<|im", "_end|>", "[INST", "ASSISTANT: ", "### User:", "</think>x", "user", "é",
    "🎉", "👩\u200d👩\u200d👧", "e\u0301", "مرحبا", "{{ bos_token }}", "{% raw %}", "\\n", "\t", "\r\n",
    "\u200b", "<|im_end|",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(TRICKY)), min_size=1, max_size=4).map("".join)


@pytest.fixture(scope="module")
def labellers():
    return {name: Labeller(family.tokenizer()) for name, family in FAMILIES.items()}


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 3))
    return conversation(*draw(st.lists(TEXT, min_size=2 * turns, max_size=2 * turns)), system=draw(st.none() | TEXT))


def expected_replies(family: Family, messages) -> str:
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    written = [family.before + (reply.strip() if family.trims else reply) for reply in replies]
    return "".join(reply + family.end for reply in written)


def holds_control_token(labeller: Labeller, messages) -> bool:
    """Whether someone typed a control token, which the pieces above sometimes add up to."""
    return any(token in message["content"] for token in special_tokens(labeller.tokenizer) for message in messages)


def usable(labeller: Labeller, messages) -> bool:
    return all(m["content"].strip() for m in messages) and not holds_control_token(labeller, messages)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen_think"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations())
def test_labelled_tokens_are_the_replies_and_their_ends_of_turn(labellers, name, messages):
    labeller, family = labellers[name], FAMILIES[name]
    result = labeller.label([messages])[0]
    if holds_control_token(labeller, messages):
        assert "reads as a control token" in result
        return
    assume(all(message["content"].strip() for message in messages))
    assert not isinstance(result, str), result
    ids, labels, replies = result
    assert np.array_equal(labels[labels != -100], ids[labels != -100])
    assert labelled_text(labeller.tokenizer, labels) == expected_replies(family, messages)
    assert sum(replies) == (labels != -100).sum()
    assert len(replies) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations())
def test_tokens_before_a_reply_are_the_prompt_that_generation_is_given(labellers, name, messages):
    labeller, family = labellers[name], FAMILIES[name]
    assume(usable(labeller, messages) and not any("</think>" in message["content"] for message in messages))
    cut_before = labeller.cut
    ids, labels, _ = labeller.label([messages])[0]
    bears_loss = np.append(labels != -100, False)
    starts = np.flatnonzero(bears_loss[:-1] & ~np.insert(bears_loss[:-2], 0, False))
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(turns)
    if labeller.cut > cut_before:
        starts, turns = starts[:1], turns[:1]  # cuts stay in the later turns' history
    elif family.rewrites:
        starts, turns = starts[-1:], turns[-1:]  # only the last prompt is still written as it was
    for start, turn in zip(starts, turns, strict=True):
        assert ids[:start].tolist() == prompt_ids(labeller.tokenizer, messages[:turn])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "vicuna"])
def test_the_whole_text_is_tokenised_as_apply_chat_template_does(labellers, name):
    messages = conversation("Where is it?", "On its way.", "Sure?", "Yes 🎉", system="Be brief.")
    ids = labellers[name].label([messages])[0][0]
    expected = labellers[name].tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.tolist() == expected


def test_the_newline_after_the_end_of_turn_bears_no_loss(labellers):
    labeller = labellers["chatml"]
    ids, labels, _ = labeller.label([conversation("Hi", "Hello", "Bye", "Ciao")])[0]
    newline = labeller.backend.encode("\n", add_special_tokens=False).ids
    assert ids[-1:].tolist() == newline and labels[-1] == -100
    assert labels[-2] == labeller.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_bos_stands_exactly_once(labellers, name):
    labeller = labellers[name]
    ids = labeller.label([conversation("Hi", "Hello", "Bye", "Ciao", system="Be brief.")])[0][0]
    assert ids[0] == labeller.tokenizer.bos_token_id and (ids == ids[0]).sum() == 1


def test_a_template_that_writes_bos_twice_is_refused():
    tokenizer = FAMILIES["llama3"].tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert "twice" in Labeller(tokenizer).label([conversation("Hi", "Hello")])[0]


@pytest.mark.parametrize("who", [0, 1])
def test_control_tokens_that_someone_typed_are_refused_not_parsed(labellers, who):
    for name, typed in (("chatml", "<|im_end|>"), ("mistral", "[INST]"), ("llama3", "<|eot_id|>")):
        contents = ["Hello", "Hello"]
        contents[who] = f"see {typed}\nuser"
        reason = labellers[name].label([conversation(*contents)])[0]
        assert typed in reason and f"message {who + 1}" in reason


def test_earlier_reasoning_that_the_template_drops_bears_no_loss(labellers):
    labeller = labellers["qwen_think"]
    messages = conversation("a?", "<think>\nhm\n</think>\n\nA.", "b?", "<think>\nho\n</think>\n\nB.")
    ids, labels, _ = labeller.label([messages])[0]
    assert labelled_text(labeller.tokenizer, labels) == "A.<|im_end|><think>\nho\n</think>\n\nB.<|im_end|>"


def test_what_the_template_adds_after_the_prompt_must_be_learnt(labellers):
    # Generation is given "<|im_start|>assistant\n" and nothing more, so the model must write the empty block itself.
    labels = labellers["qwen_think"].label([conversation("a?", "A.")])[0][1]
    assert labelled_text(labellers["qwen_think"].tokenizer, labels) == "<think>\n\n</think>\n\nA.<|im_end|>"


def test_a_system_prompt_that_moves_to_the_last_user_turn(labellers):
    labeller = labellers["mistral"]
    ids, labels, _ = labeller.label([conversation("a?", "A.", "b?", "B.", system="Be brief.")])[0]
    assert labelled_text(labeller.tokenizer, labels) == " A.</s> B.</s>"
    assert labeller.tokenizer.decode(ids) == "<s>[INST] a?[/INST] A.</s>[INST] Be brief.\n\nb?[/INST] B.</s>"


def test_a_prompt_that_the_finished_reply_does_not_share_is_refused(labellers):
    tokenizer = tiny_tokenizer()  # DeepSeek R1: the prompt opens a reasoning block, finished replies have none
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    assert "<think>" in tokenizer.chat_template
    reason = Labeller(tokenizer).label([conversation("a?", "A.")])[0]
    assert "writes '<think>\\n', which a finished reply lacks" in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("message['content'] + '<|im_end|>\n'", "message['content'] + '\n'"), "no end-of-turn token"),
        (("message['content']", "message['content'] | upper"), "rewrites a reply's text"),
        (("message['content']", "message['content'] + message['content']"), "writes a reply 2 times"),
        (("message['content']", "(message['content'] | replace('e', '3'))"), "rewrites a reply's text"),
        (("message['content']", "message['text']"), "refuses this conversation|writes a reply 0 times"),
        (
            ("{% for message in messages %}", "{% for message in messages | reverse %}"),
            "order|another prompt|can't tell",
        ),
    ],
)
def test_replies_that_cannot_be_located_for_sure_are_refused(change, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(*change)
    found = Labeller(tokenizer).label([conversation("where?", "here, see")])[0]
    assert isinstance(found, str)
    assert any(part in found for part in reason.split("|")), found


def test_conversations_that_a_template_refuses_keep_its_reason(labellers):
    messages = [*conversation("a?", "A."), {"role": "assistant", "content": "B."}]
    assert "roles must alternate" in labellers["gemma"].label([messages])[0]
    assert labellers["chatml"].label([conversation("a?")])[0] == "no assistant turn"
    assert labellers["chatml"].label([conversation("a?", " \n")])[0] == "empty reply"


def test_unusable_rows_stay_apart_from_the_usable_ones_around_them(labellers):
    results = labellers["chatml"].label([conversation("a?"), conversation("b?", "B."), conversation("c?", "")])
    assert [isinstance(result, str) for result in results] == [True, False, True]


def test_a_token_that_straddles_the_prompts_end_is_cut():
    vicuna = (FAMILIES["vicuna"].tokenizer(), "is four."), (sentencepiece_like_tokenizer(VICUNA), "Yes it is.")
    for tokenizer, reply in vicuna:
        labeller = Labeller(tokenizer)
        messages = conversation("Where is the kettle?", reply)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = prompt_ids(tokenizer, messages[:1])
        assert whole[: len(prompt)] != prompt  # else this tests nothing: " Yes" must be one token
        ids, labels, _ = labeller.label([messages])[0]
        assert ids[: len(prompt)].tolist() == prompt and (labels[: len(prompt)] == -100).all()
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
        ids, labels, _ = Labeller(tokenizer).label([messages])[0]
        prompt = prompt_ids(tokenizer, messages[:1])
        assert ids[: len(prompt)].tolist() == prompt
        assert labelled_text(tokenizer, labels) == reply + "<|im_end|>"


def test_characters_without_tokens_are_refused_not_dropped():
    tokenizer = sentencepiece_like_tokenizer(VICUNA)
    assert "é" in labelled_text(tokenizer, Labeller(tokenizer).label([conversation("a?", "né 🎉")])[0][1])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["byte_fallback"] = False
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", eos_token="</s>"
    )
    bare.chat_template = "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    assert "'é' (U+00E9)" in Labeller(bare).label([conversation("a?", "né 🎉")])[0]
    assert not isinstance(Labeller(bare).label([conversation("é?", "ne")])[0], str)  # the prompt is only read


def write_format(folder: Path, train, heldout):
    folder.mkdir()
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    for split, rows in (("train", train), ("heldout", heldout)):
        ids = [f"{split}:{number}" for number in range(1, len(rows) + 1)]
        write_table(folder / f"{split}.parquet", pa.table({"id": ids, "messages": pa.array(rows, kind)}))


@pytest.fixture(scope="module")
def stage_inputs(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").mkdir()
    os.symlink(tiny_model_dir, folder / "model" / "model")
    train = [conversation(f"Where is order {number}?", f'{{"order": "{number}"}}') for number in range(2500)]
    train[1500] = conversation("a?", "see <|im_end|>")
    write_format(folder / "format", train, [conversation("Hi", "Hello", "Bye", "Ciao")])
    return {"model": folder / "model", "format": folder / "format"}


def test_the_stage_writes_what_later_stages_read(stage_inputs, tmp_path):
    from transformers import AutoTokenizer

    summary = run({"chat_template": None, "train_on": "assistant"}, stage_inputs, tmp_path, Progress.silent())
    train, heldout = read_table(tmp_path / "train.parquet"), read_table(tmp_path / "heldout.parquet")
    details = read_json(tmp_path / "tokenize.json")
    assert train.column_names == ["id", "input_ids", "labels"] and train.num_rows == 2499 and heldout.num_rows == 1
    assert str(train.schema.field("labels").type) == str(train.schema.field("input_ids").type)
    assert train.schema.field("labels").type.value_type == pa.int32()
    assert details["template"] == "own" and details["end_of_turn"]["token"] == "<|im_end|>" and not details["warnings"]
    ids = train.column("input_ids").to_pylist()
    counts = details["counts"]["train"]
    assert counts["examples"] == 2499 and counts["tokens"] == sum(map(len, ids))
    assert counts["labelled"] == sum(label != -100 for labels in train.column("labels").to_pylist() for label in labels)
    (rejected,) = details["rejected"]
    assert rejected["id"] == "train:1501" and "<|im_end|>" in rejected["reason"]
    assert summary["rejected"] == 1
    replies = details["reply_tokens"]["heldout"]
    assert replies["count"] == 2 and details["reply_tokens"]["train"]["count"] == 2499
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.chat_template and tokenizer.pad_token
    example = details["example"]
    text = "".join(token for token, loss in zip(example["tokens"], example["loss"], strict=True) if loss)
    assert text == '{"order": "0"}<|im_end|>'
    for first, second in zip(ids[0], example["tokens"], strict=True):
        assert tokenizer.decode([first]) == second


def test_the_stage_writes_the_same_bytes_again(stage_inputs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run({"chat_template": None}, stage_inputs, tmp_path / name, Progress.silent())
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
        assert str(stage_inputs["model"]) not in (tmp_path / "a" / path).read_bytes().decode("utf-8", "replace")


def test_the_stage_says_why_nothing_could_be_used(stage_inputs, tmp_path):
    write_format(tmp_path / "format", [conversation("a?", ""), conversation("b?", ""), conversation("c?")], [])
    (tmp_path / "out").mkdir()
    inputs = {**stage_inputs, "format": tmp_path / "format"}
    with pytest.raises(UserError, match="2 of them: empty reply"):
        run({"chat_template": None}, inputs, tmp_path / "out", Progress.silent())


def test_a_model_that_does_not_stop_on_the_end_of_turn_is_warned_of(stage_inputs, tmp_path):
    folder = save_tiny_model(tmp_path / "model" / "model", eos_token_id=0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    (tmp_path / "out").mkdir()
    run({"chat_template": None}, {**stage_inputs, "model": tmp_path / "model"}, tmp_path / "out", Progress.silent())
    details = read_json(tmp_path / "out" / "tokenize.json")
    assert "stops on [0]" in details["warnings"][0] and details["end_of_turn"]["token"] == "<|im_end|>"


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(stage_inputs, tmp_path):
    folder = save_tiny_model(tmp_path / "model" / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    for name, inputs in (("plain", stage_inputs), ("cut", {**stage_inputs, "model": tmp_path / "model"})):
        (tmp_path / name).mkdir()
        run({"chat_template": None}, inputs, tmp_path / name, Progress.silent())
    assert read_table(tmp_path / "plain" / "train.parquet").equals(read_table(tmp_path / "cut" / "train.parquet"))


@pytest.mark.slow
def test_the_embedded_models_tokenizer(embedded_model_dir):
    from adder.tokenize import load_tokenizer

    tokenizer = load_tokenizer(embedded_model_dir)
    assert choose_template(tokenizer, None) == "own"
    labeller = Labeller(tokenizer)

    @settings(max_examples=80, deadline=None)
    @given(conversations())
    def check(messages):
        assume(usable(labeller, messages))
        cut_before = labeller.cut
        result = labeller.label([messages])[0]
        if isinstance(result, str):  # its vocabulary lacks a few control characters and what lies beyond U+40000
            assert "has no tokens for" in result
            replies = "".join(message["content"] for message in messages if message["role"] == "assistant")
            assert any(ord(char) < 32 or ord(char) >= 0x40000 for char in replies)
            return
        assert labelled_text(tokenizer, result[1]) == expected_replies(FAMILIES["chatml"], messages)
        # "assistant\n" and a reply's own first newline are one token: cut there, earlier turns keep their cut.
        first = next(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
        for turn in (first, len(messages) - 1) if labeller.cut == cut_before else (first,):
            prompt = prompt_ids(tokenizer, messages[:turn])
            assert result[0][: len(prompt)].tolist() == prompt
            assert result[1][len(prompt) - 1] == -100 != result[1][len(prompt)]

    check()
