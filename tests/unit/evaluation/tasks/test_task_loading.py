"""Tasks are found with their data, and what is wrong with one is told."""

from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.core.files import write_jsonl
from adder.evaluation.tasks import task_loading
from task_stage import CHOICE, GSM8K, QUESTIONS, WRITTEN, entry, needs_gsm8k


@needs_gsm8k
def test_a_split_that_is_needed_and_not_given_is_named():
    with pytest.raises(UserError, match="no file for its split 'train', from which come the 5 examples"):
        task_loading.load_tasks(entry(name="gsm8k", data={"test": str(GSM8K / "test.jsonl")}), Path())
    with pytest.raises(UserError, match="no file for its split 'test', which holds its questions; given: train$"):
        task_loading.load_tasks(entry(name="gsm8k", data={"train": str(GSM8K / "train.jsonl")}), Path())


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
