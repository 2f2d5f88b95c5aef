"""Tasks through the real lm-eval: built-in ones on local data, groups, and a user's own YAML with its helpers."""

import json
import os
import re
import shutil
from pathlib import Path

import lm_eval
import pandas as pd
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl, write_json, write_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.evaluation.tasks import lm_eval_model, task_loading
from adder.evaluation.tasks import run as tasks
from adder.evaluation.tasks.stage import TaskSettings
from adder.evaluation.tasks.task_files import task_files
from adder.workflow.settings import load
from tiny import save_tiny_model, tiny_tokenizer

GSM8K = Path(__file__).parents[5] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k")

CHOICE = """\
task: capitals
include: common.yaml
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: data/*.jsonl}}
test_split: test
"""
WRITTEN = """\
task: capitals_written
include: common.yaml
output_type: generate_until
doc_to_text: !function helper.ask
doc_to_target: "{{choices[right]}}"
process_results: !function helper.score
generation_kwargs: {until: ["or"], max_gen_toks: 9}
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: false}
  - {metric: named, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
HELPER = """\
def ask(doc):
    return "Tell me: " + doc["question"]

def score(doc, results):
    return {"length": len(results[0]), "named": doc["choices"][doc["right"]] in results[0]}
"""
LIKELY = """\
task: capitals_likely
include: common.yaml
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[right]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
QUESTIONS = [
    {"question": f"What is the capital of country {n}?", "choices": ["Paris", "Order"], "right": n % 2}
    for n in range(12)
]


def entry(**settings):
    """An entry of `evaluate.tasks` with its defaults."""
    return TaskSettings(**settings)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model with a context of 1,024, and its tokenizer, as the stages before leave them."""
    root = tmp_path_factory.mktemp("stages")
    tokenizer = tiny_tokenizer()
    # Weights as large as these make replies that differ from question to question.
    save_tiny_model(
        root / "model" / "model", max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.3
    )
    tokenizer.save_pretrained(root / "tokenize" / "tokenizer")
    end = {"id": tokenizer.eos_token_id, "token": tokenizer.eos_token}
    write_json(root / "tokenize" / "tokenize.json", {"end_of_turn": end})
    return {"model": root / "model", "tokenize": root / "tokenize"}


@pytest.fixture
def own_tasks(tmp_path):
    """A folder of a user's own tasks, their data beside them."""
    folder = tmp_path / "my tasks"
    (folder / "data").mkdir(parents=True)
    for name, text in {
        "capitals.yaml": CHOICE, "written.yaml": WRITTEN, "likely.yaml": LIKELY, "common.yaml": COMMON,
        "helper.py": HELPER,
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    write_jsonl(folder / "data" / "one.jsonl", QUESTIONS)
    return folder


@pytest.fixture
def in_fp32(monkeypatch):
    """Scores to compare need one arithmetic."""
    monkeypatch.setattr(tasks.precision, "compute_dtype", lambda device: Choice("float32", "as set"))


def run(inputs, out, **settings):
    out.mkdir()
    context = Context(Progress.silent(), Runtime(threads=1))
    tasks.run(entry(**settings), tasks.TaskInputs(**inputs), out, context)
    return read_json(out / "scores.json"), list(read_jsonl(out / "samples.jsonl"))


def plainly(inputs, settings, root, as_chat=True):
    """What lm-eval's own model class makes of the task, one request at a time, in fp32."""
    loaded = task_loading.load_tasks(settings, root)
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    return lm_eval.evaluate(
        plain, {"tasks": loaded, "groups": {}}, limit=settings.limit, bootstrap_iters=0,
        apply_chat_template=as_chat, fewshot_as_multiturn=as_chat,
    )  # fmt: skip


@needs_gsm8k
def test_gsm8k_runs_offline_with_its_own_prompt_and_scorer(inputs, tmp_path):
    data = {"train": str(GSM8K / "train.jsonl"), "test": str(GSM8K / "test.jsonl")}
    scores, samples = run(inputs, tmp_path / "out", name="gsm8k", data=data, limit=3, num_fewshot=1)
    assert scores["metric"] == "exact_match,strict-match" and scores["higher_is_better"] is True
    assert set(scores["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert scores["metrics"]["exact_match,strict-match"]["n"] == 3
    assert (scores["num_fewshot"], scores["limit"]) == (1, 3)
    assert [row["id"] for row in samples] == ["gsm8k:0", "gsm8k:1", "gsm8k:2"]
    first = next(read_jsonl(GSM8K / "test.jsonl"))
    turn = f"<|im_start|>user\nQuestion: {first['question']}\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    assert samples[0]["prompt"].endswith(turn) and "<|im_start|>assistant\n" in samples[0]["prompt"][: -len(turn)]
    assert samples[0]["reference"] == first["answer"] and set(samples[0]) >= {"reply", *scores["metrics"]}


@needs_gsm8k
def test_a_right_answer_scores(inputs, tmp_path, monkeypatch):
    """The scorer is the task's: a worked answer's number behind "####", with a thousands comma."""
    monkeypatch.setattr(
        HFLM, "generate_until", lambda self, requests, **_: ["Well. #### 18", "#### 3", "It is 70,000."]
    )
    data = {"test": str(GSM8K / "test.jsonl")}
    scores, samples = run(inputs, tmp_path / "out", name="gsm8k", data=data, limit=3, num_fewshot=0)
    assert [row["exact_match,strict-match"] for row in samples] == [1.0, 1.0, 0.0]
    assert [row["exact_match,flexible-extract"] for row in samples] == [1.0, 1.0, 1.0]
    assert scores["metrics"]["exact_match,strict-match"]["value"] == pytest.approx(2 / 3)


@needs_gsm8k
def test_a_split_that_is_needed_and_not_given_is_named():
    with pytest.raises(UserError, match="no file for its split 'train', from which come the 5 examples"):
        task_loading.load_tasks(entry(name="gsm8k", data={"test": str(GSM8K / "test.jsonl")}), Path())
    with pytest.raises(UserError, match="no file for its split 'test', which holds its questions; given: train$"):
        task_loading.load_tasks(entry(name="gsm8k", data={"train": str(GSM8K / "train.jsonl")}), Path())


def test_a_group_takes_each_members_own_files(inputs, tmp_path):
    """mmlu's data set as a clone of its repository has it: a folder a subject, Parquet."""
    for number, name in enumerate(sorted(leaf.removeprefix("mmlu_") for leaf in stem())):
        folder = tmp_path / "mmlu" / name
        folder.mkdir(parents=True)
        rows = [{"question": f"{name} {n}?", "choices": list("wxyz"), "answer": n % 4} for n in range(1 + number % 3)]
        pd.DataFrame(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    data = {"test": str(tmp_path / "mmlu" / "{config}" / "test-*.parquet")}
    scores, samples = run(inputs, tmp_path / "out", name="mmlu_stem", data=data)
    assert len(scores["subtasks"]) == 19 and scores["subtasks"]["mmlu_astronomy"]["n"] == 3
    assert scores["metric"] == "acc" and scores["metrics"]["acc"]["n"] == len(samples)
    weighted = sum(own["value"] * own["n"] for own in scores["subtasks"].values()) / len(samples)
    assert scores["metrics"]["acc"]["value"] == pytest.approx(weighted)
    assert "astronomy 0?" in next(row for row in samples if row["id"] == "mmlu_astronomy:0")["prompt"]
    assert {row["reference"] for row in samples} <= set("ABCD") and {row["reply"] for row in samples} <= set("ABCD")
    files = task_files(entry(name="mmlu_stem", data=data), Path())
    assert len(files) == 19 and all(file.suffix == ".parquet" for file in files)


def stem():
    return task_loading.built_in("mmlu_stem")[1]


def test_an_unknown_task_is_answered_with_near_names():
    with pytest.raises(UserError, match="has no task 'gsm8kk'; did you mean gsm8k, "):
        task_loading.load_tasks(entry(name="gsm8kk"), Path())


def test_data_out_of_reach_says_what_to_give(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)  # by itself it tries for 20 s
    with pytest.raises(UserError) as error:
        task_loading.load_tasks(entry(name="hellaswag"), Path())
    assert "can't be fetched: Couldn't reach" in str(error.value) and "'validation', which holds" in str(error.value)
    assert "data: {SPLIT: FILE}" in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(UserError, match="ifeval needs the Python package 'langdetect'.*lm-eval\\[ifeval\\]"):
        task_loading.load_tasks(entry(name="ifeval"), Path())


def test_code_that_a_model_writes_is_not_run():
    with pytest.raises(UserError, match="humaneval runs code that the model writes"):
        task_loading.load_tasks(entry(name="humaneval"), Path())


@pytest.mark.parametrize("as_chat", [True, False])
@pytest.mark.parametrize("name", ["capitals", "written", "likely"])
def test_scores_are_those_of_lm_evals_own_model(inputs, own_tasks, tmp_path, in_fp32, name, as_chat):
    settings = {"path": str(own_tasks / f"{name}.yaml"), "chat_template": as_chat}
    scores, samples = run(inputs, tmp_path / "out", **settings)
    expected = plainly(inputs, entry(**settings), Path(), as_chat)
    (task,) = expected["results"]
    for metric, found in scores["metrics"].items():
        assert found["value"] == pytest.approx(expected["results"][task][f"{metric},none"]) and found["n"] == 12
    by_id = {logged["doc_id"]: logged for logged in expected["samples"][task]}
    for row in samples:
        logged = by_id[int(row["id"].partition(":")[2])]
        assert row["prompt"] == logged["arguments"][0][0] and row["prompt"].startswith("<|im_start|>") == as_chat
        assert all(row[metric] == float(logged[metric]) for metric in scores["metrics"])
        if name == "written":
            assert row["reply"] == logged["resps"][0][0]
    assert name != "written" or len({row["reply"] for row in samples}) > 6


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
    write_json(tmp_path / "tokenize" / "tokenize.json", {"end_of_turn": {"id": 0, "token": "<|endoftext|>"}})
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


def test_choices_are_shown_as_text(inputs, own_tasks, tmp_path):
    scores, samples = run(inputs, tmp_path / "out", path=str(own_tasks / "capitals.yaml"), limit=4)
    assert [row["reference"] for row in samples] == ["Paris", "Order", "Paris", "Order"]
    assert all((row["reply"] == row["reference"]) == row["acc"] for row in samples)
    assert list(scores["metrics"]) == ["acc", "acc_norm"] and scores["metric"] == "acc" and scores["task"] == "capitals"


def test_own_yaml_works_wherever_the_run_starts(inputs, own_tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(own_tasks.parent)
    scores, samples = run(inputs, tmp_path / "out", path="my tasks/written.yaml", metric="named")
    assert scores["metric"] == "named" and scores["higher_is_better"] and scores["version"] == 2.0
    assert "Tell me: What is" in samples[0]["prompt"]
    monkeypatch.chdir("/")
    relative = os.path.relpath(own_tasks / "written.yaml", "/")
    assert run(inputs, tmp_path / "again", path=relative)[0]["metric"] == "length"


def test_own_data_in_place_of_the_yamls(inputs, own_tasks, tmp_path):
    pd.DataFrame(QUESTIONS[:5]).to_json(tmp_path / "other.json", orient="records", lines=True)
    scores, _ = run(
        inputs, tmp_path / "out", path=str(own_tasks / "capitals.yaml"), data={"test": str(tmp_path / "other.json")}
    )
    assert scores["metrics"]["acc"]["n"] == 5


def test_a_group_of_own_tasks(inputs, own_tasks, tmp_path):
    """Paths of its members start at their folder too, and what the group sets anew holds."""
    members = "[{task: capitals, doc_to_text: 'Now: {{question}}'}, capitals_likely]"
    (own_tasks / "all.yaml").write_text(f"group: all_capitals\ntask: {members}\n")
    scores, samples = run(inputs, tmp_path / "out", path=str(own_tasks / "all.yaml"))
    assert scores["metric"] == "acc" and list(scores["metrics"]) == ["acc"] and len(samples) == 24
    assert list(scores["subtasks"]) == ["capitals", "capitals_likely"] and scores["task"] == "all"
    assert "Now: What" in samples[0]["prompt"] and "Now" not in samples[12]["prompt"]
    files = {file.name for file in task_files(entry(path=str(own_tasks / "all.yaml")), Path())}
    assert files == {path.name for path in own_tasks.rglob("*") if path.is_file()}


def test_files_of_a_data_set_of_the_hub_are_not_looked_for_here(own_tasks):
    (own_tasks / "hub.yaml").write_text("task: x\ndataset_path: a/b\ndataset_kwargs: {data_files: far.json}\n")
    assert [file.name for file in task_files(entry(path="hub.yaml"), own_tasks)] == ["hub.yaml"]


def test_a_metric_that_is_no_mean_cannot_count(inputs, own_tasks, tmp_path):
    path = own_tasks / "likely.yaml"
    with pytest.raises(UserError, match="'perplexity' is none of its scores: acc"):
        run(inputs, tmp_path / "out", path=str(path), metric="perplexity")
    path.write_text(LIKELY.rpartition("  - ")[0])
    with pytest.raises(UserError, match="no score that is a mean over its questions \\(perplexity,none"):
        run(inputs, tmp_path / "again", path=str(path))


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


def test_without_a_template_the_questions_are_plain_text(inputs, own_tasks, tmp_path):
    bare = tmp_path / "tokenize"
    tiny_tokenizer(None).save_pretrained(bare / "tokenizer")
    write_json(bare / "tokenize.json", read_json(inputs["tokenize"] / "tokenize.json"))
    settings = {"path": str(own_tasks / "capitals.yaml"), "limit": 2}
    scores, samples = run({**inputs, "tokenize": bare}, tmp_path / "out", **settings)
    assert scores["chat_template"] is False and samples[0]["prompt"] == QUESTIONS[0]["question"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.yaml", "task: [", "is not YAML"),
        ("list.yaml", "- task", "holds list, not a dictionary"),
        ("nameless.yaml", "include: common.yaml\n", "gives its task no name: write `task: nameless`"),
        ("lost.yaml", "include: gone.yaml\n", "lost.yaml includes 'gone.yaml', which is not there"),
        (
            "nodata.yaml",
            "task: x\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n",
            "no file matches 'gone.jsonl'",
        ),
        ("columns.yaml", CHOICE.replace("{{question}}", "{{asked}}"), "UndefinedError: 'asked' is undefined"),
        ("helper.yaml", WRITTEN.replace("helper.ask", "helper.gone"), "has no function 'gone'"),
        ("unsafe.yaml", CHOICE + "unsafe_code: true\n", "runs code that the model writes"),
    ],
)
def test_mistakes_in_a_task_file_are_told(own_tasks, name, text, message):
    (own_tasks / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        task_loading.load_tasks(entry(path=str(own_tasks / name)), Path())
    assert name in str(error.value) or "capitals" in str(error.value)  # the file or the task


@pytest.mark.parametrize(("text", "message"), [("", "a file is empty"), ('{"question": "x"}\n{"q', "JSON parse error")])
def test_data_that_cannot_be_read_is_told(own_tasks, text, message):
    (own_tasks / "data" / "one.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"data of .*capitals.yaml can't be read: {message}"):
        task_loading.load_tasks(entry(path=str(own_tasks / "capitals.yaml")), Path())


def test_data_of_mixed_kinds_is_refused(own_tasks):
    write_jsonl(own_tasks / "a.jsonl", QUESTIONS)
    (own_tasks / "b.txt").write_text("x")
    for bad, found in (("*.txt", "end in .txt"), ("[ab].*", "end in .jsonl, .txt")):
        with pytest.raises(UserError, match=found):
            settings = entry(path=str(own_tasks / "capitals.yaml"), data={"test": str(own_tasks / bad)})
            task_loading.load_tasks(settings, Path())


def test_task_files_are_all_that_a_task_reads(own_tasks):
    def files(**settings):
        return [path.name for path in task_files(entry(**settings), own_tasks)]

    assert files(name="gsm8k") == []
    assert sorted(files(path="written.yaml")) == ["common.yaml", "helper.py", "one.jsonl", "written.yaml"]
    assert sorted(files(path="capitals.yaml")) == ["capitals.yaml", "common.yaml", "one.jsonl"]
    write_jsonl(own_tasks / "other.jsonl", QUESTIONS)
    assert sorted(files(path="capitals.yaml", data={"test": "other.jsonl"})) == [
        "capitals.yaml", "common.yaml", "one.jsonl", "other.jsonl",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"evaluate.tasks \(gsm8k\).data.test: no file matches 'gone.jsonl'"):
        files(name="gsm8k", data={"test": "gone.jsonl"})


def test_samples_are_json_that_any_program_reads(inputs, own_tasks, tmp_path):
    run(inputs, tmp_path / "out", path=str(own_tasks / "written.yaml"), limit=2)
    for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["id"].startswith("capitals_written:")


# ---- the documentation's examples

DOCUMENT = Path(__file__).parents[4] / "docs" / "evaluation.md"
EXAMPLES = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_settings_in_the_documentation_are_valid():
    configurations = [yaml.safe_load(text) for name, text in EXAMPLES if name == "config"]
    default = yaml.safe_load((DOCUMENT.parents[1] / "config" / "config.yaml").read_text(encoding="utf-8"))
    assert len(configurations) == 3
    for configuration in configurations:
        (settings,) = load(default | configuration).values()
        assert settings.evaluate.tasks or settings.evaluate.judge


@pytest.mark.parametrize(("name", "metric"), [("polite", "polite"), ("urgent", "acc")])
def test_tasks_in_the_documentation_run(inputs, tmp_path, name, metric):
    (tmp_path / "tasks").mkdir()
    for path, text in EXAMPLES:
        if path.startswith("tasks/"):
            (tmp_path / path).write_text(text)
    scores, samples = run(inputs, tmp_path / "out", path=str(tmp_path / "tasks" / f"{name}.yaml"))
    assert scores["metric"] == metric and len(samples) == 2
