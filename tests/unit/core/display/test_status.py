"""What a job says of itself, read by another process."""

import errno

import pytest

from adder.core.display import status as module
from adder.core.display.status import StageStatus, read_status, status_file, write_status


def test_what_is_written_is_read(tmp_path):
    file = status_file(tmp_path / "train" / "abc.log")
    assert read_status(file) == StageStatus()
    file.parent.mkdir()
    status = StageStatus(1.0, "step 1/2", 3.5, 7.0, ["warning: \ud800 is no character"], "failed")
    write_status(file, status)
    assert read_status(file) == status


def test_a_damaged_one_says_nothing_and_a_place_without_room_ends_nothing(tmp_path):
    file = tmp_path / "x.status.json"
    for text in ("", "[]", '{"other": 1}', "null", "\x00"):
        file.write_text(text)
        assert read_status(file) == StageStatus()
    write_status(tmp_path / "missing" / "x.status.json", StageStatus(text="text"))
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("notices", [[], ["warning: " + "x" * 5000]])
def test_on_a_full_disk_it_goes_where_the_one_before_was(tmp_path, monkeypatch, notices):
    file = tmp_path / "x.status.json"
    write_status(file, StageStatus(text="loading"))

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "atomic_write", full)
    write_status(file, StageStatus(text="step 1", notices=notices, error="no room"))
    assert (read_status(file).text, read_status(file).error) == ("step 1", "no room")
    write_status(tmp_path / "new", StageStatus(text="lost"))
    assert read_status(tmp_path / "new") == StageStatus()
