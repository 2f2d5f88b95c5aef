"""A run's folder says what it is made of, and whether it is as it was made."""

import shutil
from pathlib import Path
from typing import cast

import pytest

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.stage_record import StageMeaning
from adder.workflow import run_folder, stage_runner


def test_a_folder_is_whole_or_says_what_is_not(tmp_path):
    (tmp_path / "merged_model").mkdir()
    for name in ("report.html", "merged_model/model.safetensors", "merged_model/config.json"):
        (tmp_path / name).write_text(name)
    run_folder.write_record(tmp_path, {}, FileDigests(tmp_path / "digests.json", tmp_path))
    (tmp_path / "guard.json").write_text("{}")  # comes later, and is no part of it
    assert run_folder.verify(tmp_path) == []
    with (tmp_path / "merged_model" / "model.safetensors").open("r+b") as file:
        file.write(b"\xff")
    (tmp_path / "report.html").unlink()
    (tmp_path / "merged_model" / "extra.bin").touch()
    assert sorted(run_folder.verify(tmp_path)) == [
        "merged_model/extra.bin: not in the record",
        "merged_model/model.safetensors: other content",
        "report.html: missing",
    ]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_list_of_what_is_in_a_folder_is_said(tmp_path, damage):
    (tmp_path / "report.html").write_text("page")
    run_folder.write_record(tmp_path, {"report": Path("r")}, FileDigests(tmp_path / "digests.json", tmp_path))
    whole = (tmp_path / "files.json").read_bytes()
    for place in range(len(whole) - 1):
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        (tmp_path / "files.json").write_bytes(whole[:place] if damage == "truncated" else flipped)
        try:
            told = run_folder.verify(tmp_path)
        except UserError as error:
            told = [str(error)]
        assert told or whole[place : place + 1].isspace()


def test_weights_that_are_copies_are_held_against_their_stage(tmp_path):
    """Where the run's folder is on another file system than the stages its weights are other files."""
    stage, folder = tmp_path / "stages" / "merge" / "k", tmp_path / "default"
    (stage / "model").mkdir(parents=True)
    (stage / "model" / "model.safetensors").write_text("weights")
    digests = FileDigests(tmp_path / "digests.json", tmp_path)
    meaning = dict.fromkeys(("stage", "key", "settings", "identity", "asked_versions", "inputs", "code"))
    stage_runner.finish(stage, cast(StageMeaning, meaning), {}, 1.0, digests)
    (folder / "merged_model").mkdir(parents=True)
    published = folder / "merged_model" / "model.safetensors"
    shutil.copy2(stage / "model" / "model.safetensors", published)
    (folder / "merged_model" / "config.json").write_text("edited by somebody")
    assert run_folder.has_weights(folder, {"merge": stage}, digests)
    published.chmod(0o644)
    published.write_text("wEights")
    assert not run_folder.has_weights(folder, {"merge": stage}, digests)
    published.unlink()
    assert not run_folder.has_weights(folder, {"merge": stage}, digests)


def test_a_folder_without_a_record_is_none_of_a_run(tmp_path):
    with pytest.raises(UserError, match=r"has no files.json, which says what is in it"):
        run_folder.verify(tmp_path)
