"""What a task's stage counts as itself."""

import pytest
from pydantic import ValidationError

from adder.core.file_digests import FileDigests
from adder.evaluation.tasks.stage import TASK, TaskSettings


def test_a_task_has_a_name_or_a_path():
    for wrong in ({}, {"name": "gsm8k", "path": "own.yaml"}):
        with pytest.raises(ValidationError, match="either `name` or `path`"):
            TaskSettings(**wrong)


def test_a_task_is_known_by_what_its_files_hold_wherever_they_lie(tmp_path):
    def identity(folder, text):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "own.yaml").write_text(text)
        settings = TaskSettings(path=f"{folder}/own.yaml")
        return TASK.identity(settings, "evaluate.tasks.0", FileDigests(tmp_path / "digests.json", tmp_path))

    first = identity("a", "task: own\n")
    assert identity("b", "task: own\n") == first and identity("a", "task: other\n") != first
