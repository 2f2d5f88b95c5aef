"""Held-out loss, prompts, replies and scores of small models, through the real lm-eval."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from adder import evaluate, replies
from adder.errors import UserError
from adder.files import read_json, read_jsonl, write_json
from adder.progress import Progress
from adder.tokenize import run as tokenize
from tiny import save_tiny_model, write_conversations

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
    tokenize({"chat_template": None, "loss_on": "assistant"}, inputs, inputs["tokenize"], Progress.silent())
    return inputs


def tokenizer_of(inputs):
    return AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")


def run(inputs, out, **settings):
    out.mkdir()
    settings = {"max_samples": None, "max_new_tokens": "auto", "batch_size": "auto", **settings}
    evaluate.run(settings, inputs, out, Progress.silent())
    return read_json(out / "scores.json"), list(read_jsonl(out / "samples.jsonl"))


def force_reply(monkeypatch, text, end=True):
    """Make every model reply `text`, by biasing its logits, and then end the turn if `end`."""
    original = evaluate.load_model

    def load(folder, dtype, device):
        model = original(folder, dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        generate = model.generate

        def forced(input_ids, logits_processor, **options):
            start = input_ids.shape[1]

            class Force(replies.LogitsProcessor):
                def __call__(self, ids, scores):
                    position = (ids.shape[1] - start) % len(wanted)
                    forced_scores = torch.full_like(scores, -1e9)
                    forced_scores[:, wanted[position]] = 0.0
                    return forced_scores

            return generate(input_ids=input_ids, logits_processor=[*logits_processor, Force()], **options)

        model.generate = forced
        return model

    monkeypatch.setattr(evaluate, "load_model", load)


def test_loss_equals_that_of_plain_transformers(tmp_path, tiny_model_dir, monkeypatch):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    monkeypatch.setattr(evaluate, "LOSS_TOKENS", 150)  # several batches, with padding in them
    scores, samples = run(inputs, tmp_path / "out", max_new_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    rows = evaluate.load_rows(inputs, None, tokenizer_of(inputs))
    total = tokens = 0.0
    for row, sample in zip(rows, samples, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
        count = int((labels != -100).sum())
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


def test_padding_does_not_change_a_loss(tiny_model_dir):
    model = evaluate.load_model(tiny_model_dir, "float32", "cpu")
    random = torch.Generator().manual_seed(0)
    examples = []
    for length in (40, 7, 23):
        ids = torch.randint(5, 300, (length,), generator=random).tolist()
        examples.append((ids, [-100] * 3 + ids[3:]))
    with torch.inference_mode():
        together = evaluate.padded_losses(model, examples)
        for (ids, labels), found in zip(examples, together, strict=True):
            alone = evaluate.whole_head_losses(model, ids, labels)
            assert found.shape == (len(ids) - 3,) and torch.allclose(found, alone, atol=1e-5)


def test_a_model_that_caps_its_logits_is_asked_for_its_own(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = list(range(10, 30))
    row = {"input_ids": ids, "labels": [-100] * 5 + ids[5:]}
    (found,) = evaluate.row_losses(model, [row], Progress.silent())
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([row["labels"]])).loss
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("bos", ["none", "by-template", "by-tokenizer"])
def test_the_model_sees_the_prompts_that_training_used(tmp_path, monkeypatch, bos):
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
    original = replies.HFLM._model_generate

    def spy(self, context, max_length, stop, attention_mask, **options):
        seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True))
        return original(self, context, max_length, stop, attention_mask=attention_mask, **options)

    monkeypatch.setattr(replies.HFLM, "_model_generate", spy)
    scores, _ = run(inputs, tmp_path / "out", max_new_tokens=2, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    rows = evaluate.load_rows(inputs, None, tokenizer_of(inputs))
    assert len(rows[-1]["prompt"]) == 4  # system, user, assistant, user
    for row in rows:
        by_template = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == by_template and by_template in seen
        start = next(index for index in range(len(by_template), 0, -1) if row["labels"][index - 1] == -100)
        assert row["input_ids"][:start] == by_template  # what training saw before the last reply
    assert len(seen) == 4 and scores["generation"]["prompts_unlike_training"] == 0


def test_a_reply_ends_at_the_end_of_turn_and_is_scored(tmp_path, tiny_model_dir, monkeypatch):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    force_reply(monkeypatch, '{"order": "19", "date": null, "intent": "refund"}')
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


def test_a_rambling_model_costs_no_more_than_the_limit(tmp_path, tiny_model_dir, monkeypatch):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    force_reply(monkeypatch, "and so on ", end=False)
    scores, samples = run(inputs, tmp_path / "out", max_new_tokens=6)
    assert scores["generation"]["truncated"] == 4 and scores["generation"]["new_tokens"] == 24
    assert all(sample["truncated"] and sample["new_tokens"] == 6 for sample in samples)
    assert scores["heldout"]["exact_match"]["value"] == scores["heldout"]["json_valid"]["value"] == 0.0


def test_an_end_of_turn_that_is_no_special_token_is_cut_off(tmp_path, monkeypatch):
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
    force_reply(monkeypatch, "{}")
    _, samples = run(inputs, tmp_path / "out")
    assert {sample["reply"] for sample in samples} == {"{}"} and not any(sample["truncated"] for sample in samples)


def test_batches_do_not_change_replies_and_runs_repeat(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out, size in zip(outs, (1, 4, 4), strict=True):
        run(inputs, out, batch_size=size, max_new_tokens=8)
    texts = [[sample["reply"] for sample in read_jsonl(out / "samples.jsonl")] for out in outs]
    assert texts[0] == texts[1] and any(texts[0])
    assert (outs[1] / "samples.jsonl").read_bytes() == (outs[2] / "samples.jsonl").read_bytes()


def test_a_bases_repetition_penalty_plays_no_part(tmp_path):
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
    two = {row["id"] for row in evaluate.load_rows(inputs, 2, tokenizer_of(inputs))}
    more = conversations() + [{**row, "id": f"y{row['id']}"} for row in conversations()]
    grown = make_inputs(tmp_path / "grown", tiny_model_dir, more)
    chosen = [row["id"] for row in evaluate.load_rows(grown, 6, tokenizer_of(grown))]
    assert len(two) == 2 and len(chosen) == 6 and two <= set(chosen)
    assert chosen == sorted(chosen, key=[row["id"] for row in more].index)


def test_no_held_out_rows_is_said_plainly(tmp_path, tiny_model_dir):
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, rows=[])
    with pytest.raises(UserError, match="data.heldout: no row is held out"):
        run(inputs, tmp_path / "out")


def test_free_text_is_scored_as_text(tmp_path, tiny_model_dir, monkeypatch):
    rows = conversations()[:2]
    for row in rows:
        row["messages"][-1] = {"role": "assistant", "content": "It is four."}
    inputs = make_inputs(tmp_path / "in", tiny_model_dir, rows)
    force_reply(monkeypatch, "It is four.")
    scores, samples = run(inputs, tmp_path / "out")
    assert scores["kind"] == "text" and scores["heldout"]["exact_match"]["value"] == 1.0
    assert "json_valid" not in scores["heldout"] and "fields" not in samples[0]


def test_progress_counts_replies(tmp_path, tiny_model_dir):
    lines = []
    progress = Progress.silent()
    progress.line = lambda text, last=False: lines.append(text)
    inputs = make_inputs(tmp_path / "in", tiny_model_dir)
    (tmp_path / "out").mkdir()
    settings = {"max_samples": None, "max_new_tokens": 4, "batch_size": 2}
    evaluate.run(settings, inputs, tmp_path / "out", progress)
    assert any(line.startswith("generating: 2 of 4 replies, ") for line in lines)
    assert any(line.startswith("generated 4 replies") for line in lines) and "loss: 4 of 4 rows" in lines


def test_reply_lengths():
    new = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2], [9, 3, 2, 2]])
    lengths, ended = replies.reply_lengths(new, torch.tensor([2, 3]))
    assert lengths.tolist() == [3, 4, 1, 2] and ended.tolist() == [True, False, True, True]
    lengths, ended = replies.reply_lengths(new[:, :0], torch.tensor([2]))
    assert lengths.tolist() == [0] * 4 and not ended.any()


def test_batch_size_and_limit_are_chosen_with_reasons(tiny_model_dir):
    model = evaluate.load_model(tiny_model_dir, "float32", "cpu")
    assert evaluate.choose_batch_size("auto", model, 200, 100).value == 100
    assert evaluate.choose_batch_size("auto", model, 3, 100).value == 3
    assert evaluate.choose_batch_size(7, model, 200, 100).value == 7
    huge = evaluate.choose_batch_size("auto", model, 200, 10**9)
    assert huge.value < 100 and "fit in memory" in huge.reason
    assert evaluate.choose_limit("auto", {"max": 40}, 512).value == 48
    assert evaluate.choose_limit(400, {"max": 40}, 512).value == 256
