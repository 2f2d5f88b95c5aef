"""Which local files a task reads."""

import pytest

from adder.core.errors import UserError
from adder.core.files import write_jsonl
from adder.evaluation.tasks.task_files import task_files
from task_stage import QUESTIONS, entry


def test_files_of_a_data_set_of_the_hub_are_not_looked_for_here(own_tasks):
    (own_tasks / "hub.yaml").write_text("task: x\ndataset_path: a/b\ndataset_kwargs: {data_files: far.json}\n")
    assert [file.name for file in task_files(entry(path="hub.yaml"), own_tasks)] == ["hub.yaml"]


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
