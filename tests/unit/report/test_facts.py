"""What the report reads of the stages: all of it or a message, in the order of the run, further stages too."""

import pytest

from adder.core.errors import UserError
from adder.core.files import read_jsonl, write_jsonl
from adder.report.facts import STAGES, load
from report_fixture import write_stage_folders
from report_pages import EVERYTHING, write_report


def test_stages_stand_in_the_order_of_the_run_whatever_that_of_the_inputs(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, **EVERYTHING)
    facts = load(dict(sorted(inputs.items())), settings.shows)
    assert list(facts.records) == [
        *STAGES, "task_base_0", "task_tuned_0", "task_base_1", "task_tuned_1", "task_base_2",
        "task_tuned_2", "judge",
    ]  # fmt: skip


def test_a_missing_file_is_named(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    (inputs["merge"] / "proof.json").unlink()
    with pytest.raises(UserError, match=r"merge/\w+/proof.json is missing"):
        write_report(settings, inputs, tmp_path)
    with pytest.raises(UserError, match="no folder given for train"):
        write_report(settings, {k: v for k, v in inputs.items() if k != "train"}, tmp_path)


def test_evaluations_of_different_rows_are_refused(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    path = inputs["evaluate_base"] / "samples.jsonl"
    write_jsonl(path, list(read_jsonl(path))[1:])
    with pytest.raises(UserError, match="different rows.*tickets:1"):
        write_report(settings, inputs, tmp_path)


def test_tasks_on_different_documents_are_refused(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5, tasks=("gsm8k",))
    path = inputs["task_base_0"] / "samples.jsonl"
    write_jsonl(path, list(read_jsonl(path))[1:])
    with pytest.raises(UserError, match="different rows.*gsm8k:0"):
        write_report(settings, inputs, tmp_path)
