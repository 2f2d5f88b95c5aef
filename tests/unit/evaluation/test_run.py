"""Held-out loss, prompts, replies and scores of small models, through the real lm-eval."""

import json
import socket

import lm_eval
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl, read_table, write_json, write_table
from adder.core.labels import IGNORE_INDEX
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.evaluation import generation, heldout_loss, metrics, speculative_decoding
from adder.evaluation import run as evaluation
from adder.evaluation.heldout_rows import load_rows
from adder.evaluation.stage import EvaluateSettings
from adder.tokenization.run import TokenizeInputs
from adder.tokenization.run import run as tokenize
from adder.tokenization.stage import TokenizeSettings
from tiny import save_tiny_model, write_conversations
from vllm_stand_in import install_stand_in_for_vllm

SYSTEM = {"role": "system", "content": "Turn the message into JSON."}
ORDERS = ["48213", "19", "7781", "3"]


def conversations():
    """Four short ones with JSON replies of unlike lengths, the last of several turns."""
    rows = []
    for number, order in enumerate(ORDERS):
        reply = json.dumps({"intent": "refund", "order": order, "date": None})
        asked = {"role": "user", "content": "Where is order " + order + "?" * (3 * number)}
        rows.append({"id": f"x:{number}", "messages": [SYSTEM, asked, {"role": "assistant", "content": reply}]})
    rows[-1]["messages"][1:1] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{}"}]
    return rows


def make_inputs(folder, base, rows=None):
    """Folders of the stages that evaluate reads, tokenised by the real stage."""
    rows = conversations() if rows is None else rows
    inputs = {name: folder / name for name in ("model", "format", "tokenize")}
    for path in inputs.values():
        path.mkdir(parents=True)
    (inputs["model"] / "model").symlink_to(base)
    for split, own in (("train", conversations()), ("heldout", rows)):
        write_conversations(inputs["format"] / f"{split}.parquet", own)
    read = TokenizeInputs(inputs["format"], inputs["model"])
    tokenize(TokenizeSettings(), read, inputs["tokenize"], Context(Progress.silent()))
    return inputs


def tokenizer_of(inputs):
    return AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")


def run(inputs, out, **settings):
    out.mkdir()
    evaluate(inputs, out, Progress.silent(), **settings)
    return read_json(out / "scores.json"), list(read_jsonl(out / "samples.jsonl"))


def evaluate(inputs, out, progress, **settings):
    stages = evaluation.EvaluateInputs(**inputs)
    evaluation.run(EvaluateSettings(**settings), stages, out, Context(progress, Runtime(threads=1)))


def rows_of(inputs, most=None):
    tokens, conversations = inputs["tokenize"] / "heldout.arrow", inputs["format"] / "heldout.parquet"
    return load_rows(tokens, conversations, most, tokenizer_of(inputs))


def teach(inputs, text, end=True):
    """Put a model in the place of inputs["model"]/model that replies `text` to the held-out prompts, by training it."""
    tokenizer = tokenizer_of(inputs)
    end_id = read_json(inputs["tokenize"] / "tokenize.json")["end_of_turn"]["id"]
    reply = tokenizer(text, add_special_tokens=False)["input_ids"] + [end_id] * end
    prompts = [row.prompt_ids for row in rows_of(inputs)]
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss = 0.0
        for prompt in prompts:
            labels = torch.tensor([[IGNORE_INDEX] * len(prompt) + reply])
            loss = loss + model(input_ids=torch.tensor([prompt + reply]), labels=labels).loss / len(prompts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:  # each token of the reply is then far ahead of any other, in bf16 as well
            break
    assert loss < 0.01
    (inputs["model"] / "model").unlink()
    model.save_pretrained(inputs["model"] / "model")
    tokenizer.save_pretrained(inputs["model"] / "model")


@pytest.fixture(params=["own loop", "lm-eval's loop"])
def loop(request, monkeypatch):
    """Each of the two loops that replies may come from."""
    if request.param != "own loop":
        monkeypatch.setattr(speculative_decoding, "supports", lambda model: False)


def test_loss_equals_that_of_plain_transformers(tmp_path, tiny_model_dir, monkeypatch, loop):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    monkeypatch.setattr(heldout_loss, "LOSS_TOKENS", 150)  # several batches, with padding in them
    monkeypatch.setattr(speculative_decoding, "PREFILL_TOKENS", 150)
    scores, samples = run(inputs, tmp_path / "out", max_new_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    rows = rows_of(inputs)
    total = tokens = 0.0
    for row, sample in zip(rows, samples, strict=True):
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
        count = int((labels != IGNORE_INDEX).sum())
        assert sample["labelled_tokens"] == count
        assert sample["loss"] == pytest.approx(
            loss, rel=2e-2 if scores["compute_dtype"]["value"] == "bfloat16" else 1e-5
        )
        total, tokens = total + sample["loss"] * count, tokens + count
    heldout = scores["heldout"]
    assert heldout["loss"]["value"] == pytest.approx(total / tokens)
    assert heldout["perplexity"]["value"] == pytest.approx(
        torch.tensor(heldout["loss"]["value"]).exp().item(), rel=1e-5
    )
    assert heldout["loss"]["ci95"][0] < heldout["loss"]["value"] < heldout["loss"]["ci95"][1]


def test_rows_of_a_group_stay_known_and_make_intervals_wider(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    table = read_table(inputs["format"] / "heldout.parquet")
    groups = pa.array(["aa", "bb", "aa", "bb"])
    write_table(inputs["format"] / "heldout.parquet", table.append_column("group", groups))
    rows = rows_of(inputs)
    assert [row.group for row in rows] == groups.to_pylist()
    written = {"reply": "{}", "exact_match": 0}
    sample = evaluation.make_sample(rows[1], torch.tensor([0.5]), written, "text")
    assert sample["group"] == "bb"
    many = [{"loss": 1.0 + n % 6, "labelled_tokens": 3, "reply": "", "exact_match": int(n % 6 < 2)} for n in range(60)]
    alone = evaluation.summarise(many)
    together = evaluation.summarise([row | {"group": str(n % 6)} for n, row in enumerate(many)])
    for name in ("loss", "perplexity", "exact_match"):
        assert together[name]["value"] == alone[name]["value"] and together[name]["n"] == 60
        width, plain = (found[name]["ci95"][1] - found[name]["ci95"][0] for found in (together, alone))
        assert width > 2 * plain, name  # 6 rows in the place of 60: sqrt(10) times


@pytest.mark.parametrize("bos", ["none", "by-template", "by-tokenizer"])
def test_the_model_sees_the_prompts_that_training_used(tmp_path, monkeypatch, loop, bos):
    base = save_tiny_model(tmp_path / "base")
    if bos != "none":
        # A tokenizer that puts BOS before any text, as Llama's does. A template's own BOS must not be doubled, and
        # where the template writes none, none may come in.
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.bos_token = "<|endoftext|>"
        single = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = single
        assert tokenizer("a")["input_ids"][0] == 0
        tokenizer.chat_template = "{{ bos_token }}" * (bos == "by-template") + tokenizer.chat_template
        tokenizer.save_pretrained(base)
    inputs = make_inputs(tmp_path / "in", base)
    seen = []
    by_lm_eval, by_us = generation.HFLM._model_generate, speculative_decoding.generate

    def spy(self, context, max_length, stop, attention_mask, **options):
        seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True))
        return by_lm_eval(self, context, max_length, stop, attention_mask=attention_mask, **options)

    def spy_too(model, requests, *options):
        seen.extend(list(request.ids[: request.prompt_length]) for request in requests)
        return by_us(model, requests, *options)

    monkeypatch.setattr(generation.HFLM, "_model_generate", spy)
    monkeypatch.setattr(speculative_decoding, "generate", spy_too)
    scores, _ = run(inputs, tmp_path / "out", max_new_tokens=2, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    rows = rows_of(inputs)
    assert len(rows[-1].prompt) == 4  # system, user, assistant, user
    for row in rows:
        by_template = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"]
        assert row.prompt_ids == by_template and by_template in seen
        start = next(index for index in range(len(by_template), 0, -1) if row.labels[index - 1] == IGNORE_INDEX)
        assert row.input_ids[:start] == by_template  # what training saw before the last reply
    assert len(seen) == 4 and scores["generation"]["prompts_unlike_training"] == 0


def test_a_reply_ends_at_the_end_of_turn_and_is_scored(tmp_path, tiny_model_dir, loop):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    teach(inputs, '{"order": "19", "date": null, "intent": "refund"}')
    scores, samples = run(inputs, tmp_path / "out")
    assert [sample["id"] for sample in samples] == ["x:0", "x:1", "x:2", "x:3"]
    assert [sample["exact_match"] for sample in samples] == [0, 1, 0, 0]
    assert all(sample["json_valid"] for sample in samples) and not any(sample["truncated"] for sample in samples)
    assert samples[1]["reply"] == '{"order": "19", "date": null, "intent": "refund"}'
    assert samples[0]["fields"]["order"] == {"expected": "48213", "found": "19", "correct": False}
    heldout = scores["heldout"]
    assert scores["kind"] == "json" and scores["lm_eval_version"] == "0.4.13"
    assert heldout["exact_match"]["value"] == 0.25 and heldout["exact_match"]["n"] == 4
    assert heldout["json_valid"]["value"] == 1.0
    # Of 8 values expected (intent and order, four times), 8 were found and 5 right.
    assert heldout["field_f1"]["value"] == 5 / 8
    assert heldout["fields"]["order"]["f1"] == 0.25 and heldout["fields"]["intent"]["n"] == 4
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    length = len(tokenizer(samples[1]["reply"])["input_ids"]) + 1
    assert scores["generation"]["new_tokens"] == 4 * length and scores["generation"]["truncated"] == 0


def test_a_rambling_model_costs_no_more_than_the_limit(tmp_path, tiny_model_dir, loop):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    teach(inputs, "and so on " * 6, end=False)
    scores, samples = run(inputs, tmp_path / "out", max_new_tokens=6)
    assert scores["generation"]["truncated"] == 4 and scores["generation"]["new_tokens"] == 24
    assert all(sample["truncated"] and sample["new_tokens"] == 6 for sample in samples)
    assert scores["heldout"]["exact_match"]["value"] == scores["heldout"]["json_valid"]["value"] == 0.0


def test_an_end_of_turn_that_is_no_special_token_is_cut_off(tmp_path, loop):
    base = save_tiny_model(tmp_path / "base")
    inputs = make_inputs(tmp_path / "in", base)
    # As with base models whose ChatML tokens are plain words of the vocabulary: another token ends the text.
    path = inputs["tokenize"] / "tokenizer" / "tokenizer_config.json"
    write_json(path, read_json(path) | {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    stored = inputs["tokenize"] / "tokenizer" / "tokenizer.json"
    content = read_json(stored)
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    write_json(stored, content)
    teach(inputs, "{}")
    _, samples = run(inputs, tmp_path / "out")
    assert {sample["reply"] for sample in samples} == {"{}"} and not any(sample["truncated"] for sample in samples)


def test_batches_do_not_change_replies_and_runs_repeat(tmp_path, tiny_model_dir, loop):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out, size in zip(outs, (1, 4, 4), strict=True):
        run(inputs, out, batch_size=size, max_new_tokens=8)
    texts = [[sample["reply"] for sample in read_jsonl(out / "samples.jsonl")] for out in outs]
    assert texts[0] == texts[1] and any(texts[0])
    assert (outs[1] / "samples.jsonl").read_bytes() == (outs[2] / "samples.jsonl").read_bytes()


def test_a_bases_repetition_penalty_plays_no_part(tmp_path, loop):
    found = []
    for name, options in (("plain", {}), ("penalty", {"repetition_penalty": 50.0, "do_sample": True, "top_k": 3})):
        base = save_tiny_model(tmp_path / name)
        path = base / "generation_config.json"
        write_json(path, read_json(path) | options)
        inputs = make_inputs(tmp_path / f"in-{name}", base)
        found.append([sample["reply"] for sample in run(inputs, tmp_path / f"out-{name}", max_new_tokens=8)[1]])
    assert found[0] == found[1]


def test_max_samples_takes_the_same_rows_whatever_else_there_is(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    two = {row.id for row in rows_of(inputs, 2)}
    more = conversations() + [{**row, "id": f"y{row['id']}"} for row in conversations()]
    grown = make_inputs(tmp_path / "grown", tiny_model_dir, more)
    chosen = [row.id for row in rows_of(grown, 6)]
    assert len(two) == 2 and len(chosen) == 6 and two <= set(chosen)
    assert chosen == sorted(chosen, key=[row["id"] for row in more].index)


def test_no_held_out_rows_is_said_plainly(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, rows=[])
    with pytest.raises(UserError, match="data.heldout: no row is held out"):
        run(inputs, tmp_path / "out")


def test_free_text_is_scored_as_text(tmp_path, tiny_model_dir):
    rows = conversations()[:2]
    for row in rows:
        row["messages"][-1] = {"role": "assistant", "content": "It is four."}
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, rows)
    teach(inputs, "It is four.")
    scores, samples = run(inputs, tmp_path / "out")
    assert scores["kind"] == "text" and scores["heldout"]["exact_match"]["value"] == 1.0
    assert "json_valid" not in scores["heldout"] and "fields" not in samples[0]
    assert scores["metrics"]["value"] == ["exact_match", "rouge_l", "chrf"]
    assert samples[0]["rouge_l"] == samples[0]["chrf"] == 1.0
    assert scores["heldout"]["rouge_l"]["value"] == 1.0 and scores["heldout"]["chrf"]["n"] == 2


def test_the_metrics_can_be_set(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    scores, samples = run(inputs, tmp_path / "out", max_new_tokens=4, metrics=["chrf"])
    assert scores["kind"] == "text" and scores["metrics"]["reason"] == "as set"
    mean = sum(sample["chrf"] for sample in samples) / 4
    assert scores["heldout"]["chrf"]["value"] == pytest.approx(mean) and "json_valid" not in samples[0]
    low, high = scores["heldout"]["chrf"]["ci95"]
    assert low <= mean <= high
    with pytest.raises(UserError, match="evaluate.metrics: 'final_answer' needs"):
        run(inputs, tmp_path / "refused", metrics=["final_answer"])


def by_simple_evaluate(folder, rows, stop, limit):
    """Replies of lm-eval's own model as simple_evaluate runs it, one prompt at a time, in fp32."""
    table = Dataset.from_list([{"question": row.prompt[-1]["content"], "answer": row.reference} for row in rows])
    task = {
        "task": "own",
        "custom_dataset": lambda **_: DatasetDict({"test": table}),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [stop], "do_sample": False, "max_gen_toks": limit},
        "process_results": lambda doc, found: {"exact_match": metrics.exact_match(doc["answer"], found[0], "json")},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    results = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        device="cpu",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        system_instruction=SYSTEM["content"],
    )
    samples = sorted(results["samples"]["own"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples], results["results"]["own"]["exact_match,none"]


@pytest.mark.parametrize("taught", [False, True])
def test_replies_and_score_are_those_of_lm_evals_default_path(tmp_path, tiny_model_dir, monkeypatch, loop, taught):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluation.precision, "compute_dtype", lambda device: Choice("float32", "for this test"))
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, conversations()[:3])
    if taught:
        teach(inputs, conversations()[1]["messages"][-1]["content"])
    scores, samples = run(inputs, tmp_path / "out", max_new_tokens=40, batch_size=2)
    rows = rows_of(inputs)
    texts, score = by_simple_evaluate(inputs["model"] / "model", rows, "<|im_end|>", 40)
    assert [sample["reply"] for sample in samples] == texts and any(texts)
    assert scores["heldout"]["exact_match"]["value"] == score == (1 / 3 if taught else 0)


def test_nothing_asks_the_network_and_no_prompt_is_tokenised_again(tmp_path, tiny_model_dir, monkeypatch):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)

    def refuse(*_, **__):
        raise AssertionError("not here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(generation.HFLM, "tok_encode", refuse)
    monkeypatch.setattr(generation.HFLM, "tok_batch_encode", refuse)
    scores, _ = run(inputs, tmp_path / "out", max_new_tokens=4)
    assert scores["generation"]["new_tokens"] > 0


def test_prompts_that_lose_their_beginning_and_those_unlike_training_are_told_and_answered(tmp_path, monkeypatch, loop):
    base = save_tiny_model(tmp_path / "base", max_position_embeddings=72)
    inputs = make_inputs(tmp_path / "in", base)
    original = evaluation.load_rows

    def with_an_odd_one(*arguments):
        rows = original(*arguments)
        rows[0].prompt_ids = rows[0].prompt_ids[1:]
        return rows

    monkeypatch.setattr(evaluation, "load_rows", with_an_odd_one)
    said = []
    progress = Progress.silent()
    progress.say = lambda text: said.append(text)
    (tmp_path / "out").mkdir()
    evaluate(inputs, tmp_path / "out", progress, max_new_tokens=24, batch_size=2, backend="hf")
    found = read_json(tmp_path / "out" / "scores.json")["generation"]
    assert found["prompts_unlike_training"] == 1 and found["prompts_cut"] >= 1
    assert any("1 of 4 prompts aren't those" in text for text in said) and any(
        "lose their beginning" in t for t in said
    )
    assert said[0].startswith("loading the tuned model on ") and said[-1].startswith("the tuned model: loss ")
    samples = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    assert all(sample["labelled_tokens"] > 0 and 0 < sample["new_tokens"] <= 24 for sample in samples)


def test_vllm_gets_the_same_prompts_and_ends_and_counts_alike(tmp_path, tiny_model_dir, monkeypatch):
    # vLLM itself needs a GPU: this shows that lm-eval's model for it is called as it should be.
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    teach(inputs, '{"order": "19", "date": null, "intent": "refund"}')
    install_stand_in_for_vllm(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(generation, "choose_backend", lambda wanted, device: Choice(wanted, "as set"))
    by_hf, by_vllm = run(inputs, tmp_path / "hf", backend="hf"), run(inputs, tmp_path / "vllm", backend="vllm")
    for one, other in zip(by_hf[1], by_vllm[1], strict=True):
        # Losses come from one pass or from two, in bf16 on some CPUs.
        assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=2e-2, abs=1e-3)
        assert one == other
    assert by_vllm[0]["backend"]["value"] == "vllm" and by_vllm[1][1]["exact_match"] == 1


def test_progress_counts_replies(tmp_path, tiny_model_dir, loop):
    lines = []
    progress = Progress.silent()
    progress.line = lambda text, last=False: lines.append(text)
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    (tmp_path / "out").mkdir()
    evaluate(inputs, tmp_path / "out", progress, max_new_tokens=4, batch_size=2, backend="hf")
    assert any(line.startswith("generating: 2 of 4 replies, ") for line in lines)
    assert any(line.startswith("generated 4 replies") for line in lines)


def test_the_terminal_shows_the_scores_that_fit_free_text():
    heldout = {
        name: {"value": value} for name, value in (("loss", 1.2), ("exact_match", 0.0), ("rouge_l", 0.4), ("chrf", 0.5))
    }
    assert list(evaluation.summarised(heldout, "text")) == ["loss", "rouge_l", "chrf"]
    assert "exact_match" in evaluation.summarised(heldout, "json")
    assert "exact_match" in evaluation.summarised({**heldout, "exact_match": {"value": 0.1}}, "text")
