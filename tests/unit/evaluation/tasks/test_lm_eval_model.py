"""lm-eval's model asked in batches that fit, under rules that are the same for every model."""

import shutil

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LogitsProcessor

from adder.core.files import read_json, write_json, write_jsonl
from adder.evaluation.tasks import lm_eval_model
from adder.evaluation.tasks import run as tasks
from adder.tokenization.chat_template import ChatTemplate
from task_stage import QUESTIONS, WRITTEN, run
from tiny import tiny_tokenizer


@pytest.mark.parametrize(("name", "method"), [("capitals", "_model_call"), ("written", "_model_generate")])
def test_questions_are_asked_in_batches(inputs, own_tasks, tmp_path, monkeypatch, name, method):
    sizes, original = [], getattr(HFLM, method)

    def count(self, *args, **kwargs):
        sizes.append(len(args[0] if args else kwargs["context"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HFLM, method, count)
    run(inputs, tmp_path / "out", path=str(own_tasks / f"{name}.yaml"))
    assert sizes == [24 if name == "capitals" else 12]


def test_batches_fit_the_memory_that_is_free(inputs, own_tasks, tmp_path, monkeypatch, in_fp32):
    path = str(own_tasks / "capitals.yaml")
    expected, _ = run(inputs, tmp_path / "out", path=path)
    monkeypatch.setattr(lm_eval_model.hardware, "free_memory", lambda device: 1)
    one_by_one, _ = run(inputs, tmp_path / "again", path=path)
    assert one_by_one["metrics"] == expected["metrics"]


def test_a_models_own_generation_settings_are_left_out(inputs, own_tasks, tmp_path, in_fp32):
    """Base and tuned model answer under the same rules: a repetition penalty of the base's is none of the task's."""
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model")
    model.generation_config.update(repetition_penalty=9.0, do_sample=True, temperature=3.0, max_new_tokens=1)
    model.save_pretrained(tmp_path / "model" / "model")
    path = str(own_tasks / "written.yaml")
    replies = [
        [row["reply"] for row in run({**inputs, "model": folder}, out, path=path)[1]]
        for folder, out in ((inputs["model"], tmp_path / "a"), (tmp_path / "model", tmp_path / "b"))
    ]
    assert replies[0] == replies[1] and len(set(replies[0])) > 6


@pytest.mark.parametrize("as_chat", [True, False])
def test_a_template_writes_all_of_a_prompt(inputs, own_tasks, tmp_path, monkeypatch, as_chat):
    """A tokenizer that puts a token before every text doesn't put it before a conversation, as in training."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenize" / "tokenizer")
    write_json(tmp_path / "tokenize" / "tokenize.json", read_json(inputs["tokenize"] / "tokenize.json"))
    seen, original = [], HFLM._model_generate

    def see(self, context, *args, **kwargs):
        seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(context, kwargs["attention_mask"], strict=True))
        return original(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", see)
    settings = {"path": str(own_tasks / "written.yaml"), "chat_template": as_chat, "limit": 2}
    _, samples = run({**inputs, "tokenize": tmp_path / "tokenize"}, tmp_path / "out", **settings)
    expected = [tokenizer(row["prompt"], add_special_tokens=not as_chat)["input_ids"] for row in samples]
    assert sorted(seen) == sorted(expected) and all((ids[0] == 0) != as_chat for ids in seen)


def test_the_end_of_turn_ends_a_reply(inputs, own_tasks, tmp_path, monkeypatch):
    """Also where model and tokenizer know of another end alone, as bases that got a template do."""
    original, tokenizer = tasks.load_model, tiny_tokenizer()
    shutil.copytree(inputs["tokenize"], tmp_path / "tokenize")
    write_json(
        tmp_path / "tokenize" / "tokenize.json", {"end_of_turn": {"id": 0, "token": "<|endoftext|>"}, "reply_ends": []}
    )
    assert tokenizer.eos_token_id != 0

    def load(*args):
        model = original(*args)
        paris = tokenizer("Paris")["input_ids"]
        # Every second reply ends later, so that the others could go on.
        wanted = [[*paris, 0, *paris, *paris], [*paris, *paris, 0, *paris]]
        generate = model.generate

        def forced(input_ids, logits_processor, **options):
            start = input_ids.shape[1]

            class Force(LogitsProcessor):
                def __call__(self, ids, scores):
                    scores = torch.full_like(scores, -1e9)
                    for row in range(len(scores)):
                        scores[row, wanted[row % 2][ids.shape[1] - start]] = 0.0
                    return scores

            return generate(input_ids=input_ids, logits_processor=[*logits_processor, Force()], **options)

        model.generate = forced
        return model

    monkeypatch.setattr(tasks, "load_model", load)
    inputs = {**inputs, "tokenize": tmp_path / "tokenize"}
    _, samples = run(inputs, tmp_path / "out", path=str(own_tasks / "written.yaml"))
    assert {row["reply"] for row in samples} == {"Paris", "ParisParis"}


def test_a_prompt_longer_than_the_context_is_counted(inputs, own_tasks, tmp_path):
    write_jsonl(own_tasks / "data" / "one.jsonl", [QUESTIONS[0] | {"question": "where? " * 900}, QUESTIONS[1]])
    for name in ("written", "capitals"):
        scores, samples = run(inputs, tmp_path / name, path=str(own_tasks / f"{name}.yaml"))
        assert scores["prompts_cut"] == (1 if name == "written" else 2)  # two choices are two requests
        assert len(samples[0]["prompt"]) == 2000 and samples[0]["prompt"].startswith("…")


def test_a_reply_longer_than_the_context_is_held_to_half(inputs, own_tasks, tmp_path):
    text = WRITTEN.replace("max_gen_toks: 9", "max_gen_toks: 5000")
    (own_tasks / "written.yaml").write_text(text)
    scores, _ = run(inputs, tmp_path / "out", path=str(own_tasks / "written.yaml"), limit=2)
    assert scores["prompts_cut"] == 0


@pytest.mark.parametrize("stop", ["e", "a "])
def test_replies_in_slots_are_those_of_generate(inputs, own_tasks, tmp_path, monkeypatch, in_fp32, stop):
    """As on a GPU: with the task's own texts that end a reply."""
    text = WRITTEN.replace('until: ["or"], max_gen_toks: 9', f'until: ["{stop}"], max_gen_toks: 24')
    (own_tasks / "written.yaml").write_text(text)
    path = str(own_tasks / "written.yaml")
    _, expected = run(inputs, tmp_path / "a", path=path)
    used = []
    monkeypatch.setattr(lm_eval_model.TaskModel, "_decodes_in_slots", lambda self: used.append(1) or True)
    _, found = run(inputs, tmp_path / "b", path=path)
    assert used and [row["reply"] for row in found] == [row["reply"] for row in expected]
    assert not any(stop in row["reply"] for row in found)


def test_questions_bear_the_date_of_training_whatever_the_day():
    tokenizer = tiny_tokenizer(
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = object.__new__(lm_eval_model.TaskModel)
    model.template = ChatTemplate(tokenizer)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"}]
    date = "26 Jul 2024"
    expected = f"{date}<|im_start|>user\na?<|im_end|><|im_start|>assistant\n"
    assert model.apply_chat_template(asked) == expected
    begun = [*asked, {"role": "assistant", "content": "The answer is "}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == f"{expected}The answer is"
