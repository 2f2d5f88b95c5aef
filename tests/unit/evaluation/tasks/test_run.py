"""Tasks through the real lm-eval: built-in ones on local data, groups, and a user's own YAML with its helpers."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from lm_eval.models.huggingface import HFLM

from adder.core.errors import UserError
from adder.core.files import digest_file, read_json, read_jsonl, write_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.evaluation.tasks import run as tasks
from adder.evaluation.tasks import task_loading
from adder.evaluation.tasks.task_files import task_files
from adder.workflow.settings import load
from task_stage import GSM8K, LIKELY, QUESTIONS, entry, needs_gsm8k, plainly, run
from tiny import tiny_tokenizer

DOCUMENT = Path(__file__).parents[4] / "docs" / "evaluation.md"
EXAMPLES = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


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


def test_a_metric_that_is_no_mean_cannot_count(inputs, own_tasks, tmp_path):
    path = own_tasks / "likely.yaml"
    with pytest.raises(UserError, match="'perplexity' is none of its scores: acc"):
        run(inputs, tmp_path / "out", path=str(path), metric="perplexity")
    path.write_text(LIKELY.rpartition("  - ")[0])
    with pytest.raises(UserError, match="no score that is a mean over its questions \\(perplexity,none"):
        run(inputs, tmp_path / "again", path=str(path))


def test_without_a_template_the_questions_are_plain_text(inputs, own_tasks, tmp_path):
    bare = tmp_path / "tokenize"
    tiny_tokenizer(None).save_pretrained(bare / "tokenizer")
    write_json(bare / "tokenize.json", read_json(inputs["tokenize"] / "tokenize.json"))
    settings = {"path": str(own_tasks / "capitals.yaml"), "limit": 2}
    scores, samples = run({**inputs, "tokenize": bare}, tmp_path / "out", **settings)
    assert scores["chat_template"] is False and samples[0]["prompt"] == QUESTIONS[0]["question"]


def test_samples_are_json_that_any_program_reads(inputs, own_tasks, tmp_path):
    run(inputs, tmp_path / "out", path=str(own_tasks / "written.yaml"), limit=2)
    for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["id"].startswith("capitals_written:")


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


def test_what_a_tasks_own_code_opens_is_told_with_its_digest(inputs, own_tasks, tmp_path):
    """Also modules that it imports from beside it; nothing that the settings name, and no library's cache."""
    (own_tasks / "other.py").write_text("WORDS = open(__file__.replace('other.py', 'words.txt')).read()\n")
    (own_tasks / "words.txt").write_text("Tell me: ")
    helper = (own_tasks / "helper.py").read_text()
    beside = "import pathlib, sys\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\nfrom other import WORDS\n"
    (own_tasks / "helper.py").write_text(beside + helper.replace('"Tell me: "', "WORDS"))
    (tmp_path / "out").mkdir()
    summary = tasks.run(
        entry(path=str(own_tasks / "written.yaml"), limit=2),
        tasks.TaskInputs(**inputs),
        tmp_path / "out",
        Context(Progress.silent(), Runtime(threads=1), results=tmp_path / "results"),
    )
    assert summary["also_read"] == {
        str(own_tasks / name): digest_file(own_tasks / name) for name in ("other.py", "words.txt")
    }
