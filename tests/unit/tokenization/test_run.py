import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.tokenization.chat_template import UnusableRow, choose_template, special_tokens
from adder.tokenization.labels import Labeller
from adder.tokenization.run import run
from adder.tokenization.token_table import SCHEMA, TokenTable
from chat_families import (
    FAMILIES,
    VICUNA,
    Family,
    bos_adding,
    conversation,
    label,
    labelled_text,
    prompt_ids,
    rstrip_tokenizer,
    sentencepiece_like_tokenizer,
    stopped_clock,  # noqa: F401
)  # fmt: skip
from conversation_cases import TEXT
from tiny import save_tiny_model, tiny_tokenizer


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
    result = label(labeller, messages)
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
    ids, labels, _ = label(labeller, messages)
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
    ids = label(labellers[name], messages)[0]
    taken = [labellers[name].finder.template.taken(message) for message in messages]
    expected = labellers[name].tokenizer.apply_chat_template(taken, return_dict=False)
    assert ids.tolist() == expected


def test_the_newline_after_the_end_of_turn_bears_no_loss(labellers):
    labeller = labellers["chatml"]
    ids, labels, _ = label(labeller, conversation("Hi", "Hello", "Bye", "Ciao"))
    newline = labeller.backend.encode("\n", add_special_tokens=False).ids
    assert ids[-1:].tolist() == newline and labels[-1] == -100
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


@pytest.mark.parametrize("who", [0, 1])
def test_control_tokens_that_someone_typed_are_refused_not_parsed(labellers, who):
    for name, typed in (("chatml", "<|im_end|>"), ("mistral", "[INST]"), ("llama3", "<|eot_id|>")):
        contents = ["Hello", "Hello"]
        contents[who] = f"see {typed}\nuser"
        reason = label(labellers[name], conversation(*contents))
        assert typed in reason and f"message {who + 1}" in reason


def test_earlier_reasoning_that_the_template_drops_bears_no_loss(labellers):
    labeller = labellers["qwen_think"]
    messages = conversation("a?", "<think>\nhm\n</think>\n\nA.", "b?", "<think>\nho\n</think>\n\nB.")
    ids, labels, _ = label(labeller, messages)
    assert labelled_text(labeller.tokenizer, labels) == "A.<|im_end|><think>\nho\n</think>\n\nB.<|im_end|>"


def test_what_the_template_adds_after_the_prompt_must_be_learnt(labellers):
    # Generation is given "<|im_start|>assistant\n" and nothing more, so the model must write the empty block itself.
    labels = label(labellers["qwen_think"], conversation("a?", "A."))[1]
    assert labelled_text(labellers["qwen_think"].tokenizer, labels) == "<think>\n\n</think>\n\nA.<|im_end|>"


def test_a_system_prompt_that_moves_to_the_last_user_turn(labellers):
    labeller = labellers["mistral"]
    ids, labels, _ = label(labeller, conversation("a?", "A.", "b?", "B.", system="Be brief."))
    assert labelled_text(labeller.tokenizer, labels) == " A.</s> B.</s>"
    assert labeller.tokenizer.decode(ids) == "<s>[INST] a?[/INST] A.</s>[INST] Be brief.\n\nb?[/INST] B.</s>"


def test_a_prompt_that_the_finished_reply_does_not_share_is_refused(labellers):
    tokenizer = tiny_tokenizer()  # DeepSeek R1: the prompt opens a reasoning block, finished replies have none
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    assert "<think>" in tokenizer.chat_template
    reason = label(Labeller(tokenizer), conversation("a?", "A."))
    assert "'assistant\\n<think>\\n'" in reason and "another prompt than it is given" in reason


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
    found = label(Labeller(tokenizer), conversation("where?", "here, see"))
    assert isinstance(found, str)
    assert any(part in found for part in reason.split("|")), found


def test_conversations_that_a_template_refuses_keep_its_reason(labellers):
    messages = [*conversation("a?", "A."), {"role": "assistant", "content": "B."}]
    assert "roles must alternate" in label(labellers["gemma"], messages)
    assert label(labellers["chatml"], conversation("a?")) == "no assistant turn"
    assert label(labellers["chatml"], conversation("a?", " \n")) == "empty reply"


def test_unusable_rows_stay_apart_from_the_usable_ones_around_them(labellers):
    turns = (["a?"], ["b?", "B."], ["c?", ""], ["d?", "\nD."], ["e?", "E."])
    results = labellers["chatml"].label([{"messages": conversation(*contents)} for contents in turns])
    assert [isinstance(result, UnusableRow) for result in results] == [True, False, True, False, False]
    written = [labelled_text(labellers["chatml"].tokenizer, results[number].labels) for number in (1, 3, 4)]
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


def write_format(folder: Path, train, heldout):
    """The format stage's folder; a row is a list of messages or a whole conversation."""
    folder.mkdir()
    for split, rows in (("train", train), ("heldout", heldout)):
        conversations = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        columns = {
            "id": [f"{split}:{number}" for number in range(1, len(rows) + 1)],
            "source": ["a" if number % 5 else "b" for number in range(1, len(rows) + 1)],
            "conversation": [json.dumps(conversation) for conversation in conversations],
            "digest": pa.array(range(len(rows)), pa.int64()),
        }
        types = [pa.string(), pa.string(), pa.string(), pa.int64()]
        schema = pa.schema(list(zip(columns, types, strict=True)))
        pq.write_table(pa.table(columns, schema=schema), folder / f"{split}.parquet", row_group_size=700)


SETTINGS = {"chat_template": None, "loss_on": "assistant"}


def rows_of(path: Path) -> list[dict]:
    return pa.ipc.open_file(str(path)).read_all().to_pylist()


@pytest.fixture(scope="module")
def stage_inputs(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").mkdir()
    os.symlink(tiny_model_dir, folder / "model" / "model")
    train = [conversation(f"Where is order {number}?", f'{{"order": "{number}"}}') for number in range(2500)]
    train[1500] = conversation("a?", "see <|im_end|>")
    train[1600] = conversation("a?", "\nA reply that begins with a new line")
    write_format(folder / "format", train, [conversation("Hi", "Hello", "Bye", "Ciao")])
    return {"model": folder / "model", "format": folder / "format"}


def test_the_stage_writes_what_later_stages_read(stage_inputs, tmp_path):
    summary = run(SETTINGS, stage_inputs, tmp_path, Progress.silent())
    table = TokenTable(tmp_path / "train.arrow")
    train, heldout = rows_of(tmp_path / "train.arrow"), rows_of(tmp_path / "heldout.arrow")
    details = read_json(tmp_path / "tokenize.json")
    assert len(table) == len(train) == 2499 and len(heldout) == 1
    assert pa.ipc.open_file(str(tmp_path / "train.arrow")).schema == SCHEMA
    assert [row["digest"] for row in train] == [number for number in range(2500) if number != 1500]
    assert [row["id"] for row in train] == [f"train:{number}" for number in range(1, 2501) if number != 1501]
    for row in train:
        assert row["tokens"] == len(row["input_ids"]) == len(row["labels"])
        assert row["labelled"] == sum(label != -100 for label in row["labels"])
    assert details["template"] == "own" and details["loss_on"] == "assistant" and not details["warnings"]
    assert details["end_of_turn"]["token"] == "<|im_end|>"
    counts = details["counts"]["train"]
    assert counts == {
        "examples": 2499, "tokens": int(table.column("tokens").sum()), "labelled": int(table.column("labelled").sum()),
        "cut": 0,
    }  # fmt: skip
    (rejected,) = details["rejected"]
    assert rejected["id"] == "train:1501" and "<|im_end|>" in rejected["reason"] and rejected["split"] == "train"
    assert summary["rejected"] == details["rejected_count"] == 1
    assert list(details["rejected_by_reason"].values()) == [1]
    replies = details["reply_tokens"]["heldout"]
    assert replies["count"] == 2 and details["reply_tokens"]["train"]["count"] == 2499
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.chat_template and tokenizer.pad_token
    examples = details["examples"]
    assert [(one["id"], one["source"]) for one in examples] == [("train:1", "a"), ("train:5", "b"), ("train:2", "a")]
    for example, row in zip(examples, (train[0], train[4], train[1]), strict=True):
        text = "".join(token for token, loss in zip(example["tokens"], example["loss"], strict=True) if loss)
        assert text == f'{{"order": "{row["digest"]}"}}<|im_end|>'
        assert [tokenizer.decode([index]) for index in row["input_ids"]] == example["tokens"]


def test_workers_write_what_one_process_writes(stage_inputs, tmp_path, monkeypatch):
    for name, workers in (("one", 1), ("two", 2)):
        monkeypatch.setattr("adder.core.parallel.worker_count", lambda *_, count=workers: count)
        (tmp_path / name).mkdir()
        run(SETTINGS, stage_inputs, tmp_path / name, Progress.silent())
    for path in ("train.arrow", "heldout.arrow", "tokenize.json"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_the_stage_writes_the_same_bytes_again(stage_inputs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(SETTINGS, stage_inputs, tmp_path / name, Progress.silent())
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
        run(SETTINGS, inputs, tmp_path / "out", Progress.silent())


def test_rejected_rows_are_counted_by_kind_and_listed_up_to_a_limit(stage_inputs, tmp_path):
    bad = [conversation(f"{number}?", f"see <|im_{'end' if number % 2 else 'start'}|>") for number in range(1100)]
    write_format(tmp_path / "format", [*bad, conversation("a?", "")], [conversation("b?", ""), conversation("c?", "C")])
    write_format(tmp_path / "more", [conversation("a?", "A.")], [])
    merged = [pq.read_table(tmp_path / name / "train.parquet") for name in ("format", "more")]
    pq.write_table(pa.concat_tables(merged), tmp_path / "format" / "train.parquet")
    (tmp_path / "out").mkdir()
    run(SETTINGS, {**stage_inputs, "format": tmp_path / "format"}, tmp_path / "out", Progress.silent())
    details = read_json(tmp_path / "out" / "tokenize.json")
    assert details["rejected_count"] == 1102 and len(details["rejected"]) == 1000
    assert sorted(details["rejected_by_reason"].values()) == [2, 1100]
    assert details["rejected_by_reason"]["empty reply"] == 2


def test_a_model_that_does_not_stop_on_the_end_of_turn_is_warned_of(stage_inputs, tmp_path):
    folder = save_tiny_model(tmp_path / "model" / "model", eos_token_id=0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    (tmp_path / "out").mkdir()
    run(SETTINGS, {**stage_inputs, "model": tmp_path / "model"}, tmp_path / "out", Progress.silent())
    details = read_json(tmp_path / "out" / "tokenize.json")
    assert "stops on [0]" in details["warnings"][0] and details["end_of_turn"]["token"] == "<|im_end|>"


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(stage_inputs, tmp_path):
    folder = save_tiny_model(tmp_path / "model" / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    for name, inputs in (("plain", stage_inputs), ("cut", {**stage_inputs, "model": tmp_path / "model"})):
        (tmp_path / name).mkdir()
        run(SETTINGS, inputs, tmp_path / name, Progress.silent())
    assert (tmp_path / "plain" / "train.arrow").read_bytes() == (tmp_path / "cut" / "train.arrow").read_bytes()


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_model_without_a_template_gets_one_that_is_saved_with_it(name, tmp_path):
    tokenizer = tiny_tokenizer(None) if name == "chatml" else sentencepiece_like_tokenizer(None)
    tokenizer.save_pretrained(tmp_path / "model" / "model")
    write_format(tmp_path / "format", [conversation("a?", "A."), {"text": "A text."}], [conversation("b?", "B.")])
    (tmp_path / "out").mkdir()
    inputs = {"model": tmp_path / "model", "format": tmp_path / "format"}
    run(SETTINGS, inputs, tmp_path / "out", Progress.silent())
    details = read_json(tmp_path / "out" / "tokenize.json")
    assert details["template"] == name and "no chat template" in details["warnings"][0]
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert len(saved) == len(tokenizer) and saved.pad_token is not None
    ids = saved.apply_chat_template(conversation("a?", "A."), return_dict=False)
    chat, text = rows_of(tmp_path / "out" / "train.arrow")
    assert chat["input_ids"] == ids
    assert text["labelled"] == text["tokens"] - 1  # nothing predicts the first token


def test_reasoning_without_a_place_in_the_template_is_warned_of(stage_inputs, tmp_path):
    row = conversation("a?", "A.")
    row[1]["reasoning_content"] = "Why."
    write_format(tmp_path / "format", [row], [])
    (tmp_path / "out").mkdir()
    run(SETTINGS, {**stage_inputs, "format": tmp_path / "format"}, tmp_path / "out", Progress.silent())
    assert "no place for reasoning" in read_json(tmp_path / "out" / "tokenize.json")["warnings"][0]


def test_plain_texts_carry_loss_on_all_of_them_and_end(labellers):
    labeller = labellers["chatml"]
    found = labeller.label([{"text": "My order has arrived."}, {"messages": conversation("a?", "A.")}, {"text": " "}])
    assert labeller.tokenizer.decode(found[0].ids) == "My order has arrived.<|im_end|>"
    assert np.array_equal(found[0].ids, found[0].labels) and found[0].replies == []
    assert labelled_text(labeller.tokenizer, found[1].labels) == "A.<|im_end|>"
    assert str(found[2]) == "empty text"


def test_plain_texts_begin_once_and_end_once():
    tokenizer = bos_adding(sentencepiece_like_tokenizer(None))
    choose_template(tokenizer, None)
    texts = ["Yes it is.", "<s>Yes it is.", "Yes it is.</s>"]
    for found in Labeller(tokenizer).label([{"text": text} for text in texts]):
        assert (found.ids == tokenizer.bos_token_id).sum() == (found.ids == tokenizer.eos_token_id).sum() == 1
        assert found.ids[0] == tokenizer.bos_token_id and found.ids[-1] == tokenizer.eos_token_id


def test_loss_on_the_last_reply_only():
    for name in ("chatml", "mistral", "marked_wide", "vicuna"):
        labeller = Labeller(FAMILIES[name].tokenizer(), "last")
        ids, labels, replies = label(labeller, conversation("a?", "A.", "b?", "B."))
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


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_a_tiny_model_learns_to_stop(pad, tmp_path):
    save_tiny_model(tmp_path / "model" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "model")
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "model" / "model")
    replies = {"two?": "four", "order?": "No", "kettle?": "Please refund"}
    write_format(tmp_path / "format", [conversation(*turn) for turn in replies.items()], [conversation("a?", "A.")])
    (tmp_path / "out").mkdir()
    inputs = {"model": tmp_path / "model", "format": tmp_path / "format"}
    run(SETTINGS, inputs, tmp_path / "out", Progress.silent())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "model", dtype=torch.float32)
    assert tokenizer.pad_token is not None and len(tokenizer) <= model.get_input_embeddings().num_embeddings
    rows = rows_of(tmp_path / "out" / "train.arrow")
    width = max(row["tokens"] for row in rows)
    padded = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [fill] * (width - row["tokens"]) for row in rows])
        for name, fill in padded.items()
    }
    mask = torch.tensor([[1] * row["tokens"] + [0] * (width - row["tokens"]) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**batch, attention_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stop = read_json(tmp_path / "out" / "tokenize.json")["end_of_turn"]["id"]
    for question, reply in replies.items():
        prompt = torch.tensor([prompt_ids(tokenizer, conversation(question))])
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
            eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = written[0, prompt.shape[1] :].tolist()
        assert new[-1] == stop and len(new) < 40 and tokenizer.decode(new[:-1]) == reply


@pytest.mark.slow
def test_the_embedded_models_tokenizer(embedded_model_dir):
    from adder.tokenization.run import load_tokenizer

    tokenizer = load_tokenizer(embedded_model_dir)
    assert choose_template(tokenizer, None) == "own"
    labeller = Labeller(tokenizer)

    @settings(max_examples=80, deadline=None)
    @given(conversations())
    def check(messages):
        assume(usable(labeller, messages))
        cut_before = labeller.cut
        result = label(labeller, messages)
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
