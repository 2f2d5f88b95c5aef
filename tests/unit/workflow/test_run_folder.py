"""What is there is asked for anew where it is of other stages."""

import os

import pytest

from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.workflow import run_folder


def test_a_request_is_new_only_where_the_record_tells_of_other_stages(tmp_path):
    record, file = tmp_path / "default" / "stages.json", tmp_path / "cache" / "requests" / "default.json"
    record.parent.mkdir()
    run_folder.request(tmp_path, "default", {"train": "a"}, record)
    assert read_json(file) == {"train": "a"}
    write_json(record, {"train": "a"})
    os.utime(file, (5, 5))
    run_folder.request(tmp_path, "default", {"train": "a"}, record)
    assert file.stat().st_mtime == 5
    run_folder.request(tmp_path, "default", {"train": "b"}, record)
    assert file.stat().st_mtime > record.stat().st_mtime - 1 and read_json(file) == {"train": "b"}
    run_folder.request(tmp_path, "default", {"train": "a"}, record)  # made already, so nothing is newer for it
    assert file.stat().st_mtime == 0 and read_json(file) == {"train": "a"}
    file.unlink()
    run_folder.request(tmp_path, "default", {"train": "a"}, record)
    assert file.stat().st_mtime == 0


def test_a_folder_is_whole_or_says_what_is_not(tmp_path):
    (tmp_path / "merged_model").mkdir()
    for name in ("report.html", "merged_model/model.safetensors", "merged_model/config.json"):
        (tmp_path / name).write_text(name)
    write_json(tmp_path / run_folder.FILES, run_folder.file_digests(tmp_path))
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


def test_a_folder_without_a_record_is_none_of_a_run(tmp_path):
    with pytest.raises(UserError, match=r"has no files.json, which says what is in it"):
        run_folder.verify(tmp_path)
