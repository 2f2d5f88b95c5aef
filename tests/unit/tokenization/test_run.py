"""The stage "tokenize": what later stages read, whatever the number of workers, and what it warns of."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.tokenization.run import TokenizeInputs, run
from adder.tokenization.stage import TokenizeSettings
from adder.tokenization.token_table import SCHEMA, TokenTable
from chat_families import (
    QWEN_THINK,
    conversation,
    prompt_ids,
    sentencepiece_like_tokenizer,
)
from tiny import save_tiny_model, tiny_tokenizer


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


SETTINGS = TokenizeSettings()
CONTEXT = Context(Progress.silent(), Runtime(threads=1))


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
    return TokenizeInputs(folder / "format", folder / "model")


def test_the_stage_writes_what_later_stages_read(stage_inputs, tmp_path):
    summary = run(SETTINGS, stage_inputs, tmp_path, CONTEXT)
    table = TokenTable(tmp_path / "train.arrow")
    train, heldout = rows_of(tmp_path / "train.arrow"), rows_of(tmp_path / "heldout.arrow")
    details = read_json(tmp_path / "tokenize.json")
    assert len(table) == len(train) == 2499 and len(heldout) == 1
    assert pa.ipc.open_file(str(tmp_path / "train.arrow")).schema == SCHEMA
    assert [row["digest"] for row in train] == [number for number in range(2500) if number != 1500]
    assert [row["id"] for row in train] == [f"train:{number}" for number in range(1, 2501) if number != 1501]
    for row in train:
        assert row["tokens"] == len(row["input_ids"]) == len(row["labels"])
        assert row["labelled"] == sum(label != IGNORE_INDEX for label in row["labels"])
    assert details["template"] == "own" and details["loss_on"] == "assistant" and not details["warnings"]
    assert details["end_of_turn"]["token"] == "<|im_end|>"
    counts = details["counts"]["train"]
    assert counts == {
        "examples": 2499, "tokens": int(table.column("tokens").sum()), "labelled": int(table.column("labelled").sum()),
        "split": 0, "unmatched": 0, "cut": 0,
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
        run(SETTINGS, stage_inputs, tmp_path / name, CONTEXT)
    for path in ("train.arrow", "heldout.arrow", "tokenize.json"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_the_stage_writes_the_same_bytes_again(stage_inputs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(SETTINGS, stage_inputs, tmp_path / name, CONTEXT)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
        assert str(stage_inputs.model) not in (tmp_path / "a" / path).read_bytes().decode("utf-8", "replace")


def test_the_stage_says_why_nothing_could_be_used(stage_inputs, tmp_path):
    write_format(tmp_path / "format", [conversation("a?", ""), conversation("b?", ""), conversation("c?")], [])
    (tmp_path / "out").mkdir()
    inputs = replace(stage_inputs, format=tmp_path / "format")
    with pytest.raises(UserError, match="2 of them: empty reply"):
        run(SETTINGS, inputs, tmp_path / "out", CONTEXT)


@pytest.mark.parametrize("split", ["training", "held-out"])
def test_many_rows_left_out_stop_the_run_with_the_reason(split, stage_inputs, tmp_path):
    good = [conversation(f"{number}?", "A.") for number in range(6)]
    bad = [*good, *(conversation(f"{number}?", "see <|im_end|>") for number in range(3)), conversation("c?", "")]
    write_format(tmp_path / "format", *((bad, good) if split == "training" else (good, bad)))
    inputs = replace(stage_inputs, format=tmp_path / "format")
    (tmp_path / "out").mkdir()
    expected = rf"4 of 10 {split} conversations \(40.0%\) .* tokenize.max_rejected allows \(30.0%\); most often, 3 of "
    with pytest.raises(UserError, match=expected + "them: a text holds what the tokenizer reads as a control token"):
        run(TokenizeSettings(max_rejected=0.3), inputs, tmp_path / "out", CONTEXT)
    assert run(TokenizeSettings(max_rejected=0.4), inputs, tmp_path / "out", CONTEXT)["rejected"] == 4


def test_a_split_of_which_nothing_can_be_used_is_named_for_that(stage_inputs, tmp_path):
    write_format(tmp_path / "format", [conversation("a?", "A.")] * 9, [conversation("b?", "")] * 3)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"3 of 3 held-out conversations \(100.0%\).*3 of them: empty reply"):
        run(SETTINGS, replace(stage_inputs, format=tmp_path / "format"), tmp_path / "out", CONTEXT)


def test_rejected_rows_are_counted_by_kind_and_listed_up_to_a_limit(stage_inputs, tmp_path):
    bad = [conversation(f"{number}?", f"see <|im_{'end' if number % 2 else 'start'}|>") for number in range(1100)]
    write_format(tmp_path / "format", [*bad, conversation("a?", "")], [conversation("b?", ""), conversation("c?", "C")])
    write_format(tmp_path / "more", [conversation("a?", "A.")], [])
    merged = [pq.read_table(tmp_path / name / "train.parquet") for name in ("format", "more")]
    pq.write_table(pa.concat_tables(merged), tmp_path / "format" / "train.parquet")
    (tmp_path / "out").mkdir()
    settings = TokenizeSettings(max_rejected=1)
    run(settings, replace(stage_inputs, format=tmp_path / "format"), tmp_path / "out", CONTEXT)
    details = read_json(tmp_path / "out" / "tokenize.json")
    assert details["rejected_count"] == 1102 and len(details["rejected"]) == 1000
    assert sorted(details["rejected_by_reason"].values()) == [2, 1100]
    assert details["rejected_by_reason"]["empty reply"] == 2


def test_a_model_that_does_not_stop_on_the_end_of_turn_is_warned_of(stage_inputs, tmp_path):
    folder = save_tiny_model(tmp_path / "model" / "model", eos_token_id=0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    (tmp_path / "out").mkdir()
    run(SETTINGS, replace(stage_inputs, model=tmp_path / "model"), tmp_path / "out", CONTEXT)
    details = read_json(tmp_path / "out" / "tokenize.json")
    assert "stops on [0]" in details["warnings"][0] and details["end_of_turn"]["token"] == "<|im_end|>"


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(stage_inputs, tmp_path):
    folder = save_tiny_model(tmp_path / "model" / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    for name, inputs in (("plain", stage_inputs), ("cut", replace(stage_inputs, model=tmp_path / "model"))):
        (tmp_path / name).mkdir()
        run(SETTINGS, inputs, tmp_path / name, CONTEXT)
    assert (tmp_path / "plain" / "train.arrow").read_bytes() == (tmp_path / "cut" / "train.arrow").read_bytes()


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_model_without_a_template_gets_one_that_is_saved_with_it(name, tmp_path):
    tokenizer = tiny_tokenizer(None) if name == "chatml" else sentencepiece_like_tokenizer(None)
    tokenizer.save_pretrained(tmp_path / "model" / "model")
    write_format(tmp_path / "format", [conversation("a?", "A."), {"text": "A text."}], [conversation("b?", "B.")])
    (tmp_path / "out").mkdir()
    inputs = TokenizeInputs(tmp_path / "format", tmp_path / "model")
    run(SETTINGS, inputs, tmp_path / "out", CONTEXT)
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
    run(SETTINGS, replace(stage_inputs, format=tmp_path / "format"), tmp_path / "out", CONTEXT)
    assert "no place for reasoning" in read_json(tmp_path / "out" / "tokenize.json")["warnings"][0]


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_a_tiny_model_learns_to_stop(pad, tmp_path):
    save_tiny_model(tmp_path / "model" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "model")
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "model" / "model")
    replies = {"two?": "four", "order?": "No", "kettle?": "Please refund"}
    write_format(tmp_path / "format", [conversation(*turn) for turn in replies.items()], [conversation("a?", "A.")])
    (tmp_path / "out").mkdir()
    inputs = TokenizeInputs(tmp_path / "format", tmp_path / "model")
    run(SETTINGS, inputs, tmp_path / "out", CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "model", dtype=torch.float32)
    assert tokenizer.pad_token is not None and len(tokenizer) <= model.get_input_embeddings().num_embeddings
    rows = rows_of(tmp_path / "out" / "train.arrow")
    width = max(row["tokens"] for row in rows)
    padded = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE_INDEX}
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


def test_conversations_that_a_template_rewrites_are_split_and_counted(tmp_path):
    save_tiny_model(tmp_path / "model" / "model", chat_template=QWEN_THINK + "{{ style }}")
    several = conversation("a?", "<think>\nhm\n</think>\n\nA.", "b?", "<think>\nho\n</think>\n\nB.")
    greeting = [{"role": "assistant", "content": "Hello."}, *conversation("a?", "A.")]
    write_format(tmp_path / "format", [several, conversation("a?", "A."), several, greeting], [several])
    (tmp_path / "out").mkdir()
    settings = TokenizeSettings(template_variables={"style": ""})
    run(settings, TokenizeInputs(tmp_path / "format", tmp_path / "model"), tmp_path / "out", CONTEXT)
    details = read_json(tmp_path / "out" / "tokenize.json")
    train, heldout = (rows_of(tmp_path / "out" / f"{name}.arrow") for name in ("train", "heldout"))
    assert [row["id"] for row in train] == ["train:1", "train:1#2", "train:2", "train:3", "train:3#2", "train:4"]
    assert [row["id"] for row in heldout] == ["heldout:1"]
    assert details["counts"]["train"]["split"] == 2 and details["counts"]["train"]["unmatched"] == 1
    assert details["counts"]["heldout"]["split"] == 0 and details["counts"]["heldout"]["unmatched"] == 1
    (end,) = details["reply_ends"]
    assert end["token"] == "<|im_end|>" and end["replies"] == 6
    assert details["template_variables"] == {"style": ""}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert "set style" in tokenizer.chat_template
    texts = [tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX]) for row in train[:2]]
    assert texts == ["<think>\nho\n</think>\n\nB.<|im_end|>", "<think>\nhm\n</think>\n\nA.<|im_end|>"]
    said = " ".join(details["warnings"])
    assert "2 conversations became several examples (6 in all)" in said and "1 held-out replies carry no loss" in said


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_the_token(stage_inputs, tmp_path):
    model = tmp_path / "model" / "model"
    shutil.copytree(stage_inputs.model / "model", model)
    config = read_json(model / "config.json")
    (tmp_path / "out").mkdir()
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(UserError, match=r"its tokenizer writes '.+' as token \d+, and its embedding has rows for 20"):
        run(SETTINGS, replace(stage_inputs, model=tmp_path / "model"), tmp_path / "out", CONTEXT)
