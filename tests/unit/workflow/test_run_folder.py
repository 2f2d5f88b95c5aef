"""What is there is asked for anew where it is of other stages."""

import os

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
    file.unlink()
    run_folder.request(tmp_path, "default", {"train": "a"}, record)  # made already, so nothing is newer for it
    assert file.stat().st_mtime == 0
