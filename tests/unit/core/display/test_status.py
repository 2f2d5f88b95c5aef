"""What a job says of itself, read by another process."""

from adder.core.display.status import StageStatus, read_status, status_file, write_status


def test_what_is_written_is_read(tmp_path):
    file = status_file(tmp_path / "train" / "abc.log")
    assert read_status(file) == StageStatus()
    file.parent.mkdir()
    status = StageStatus("step 1/2", 3.5, 7.0, ["warning: \ud800 is no character"], "failed")
    write_status(file, status)
    assert read_status(file) == status


def test_a_damaged_one_says_nothing_and_a_place_without_room_ends_nothing(tmp_path):
    file = tmp_path / "x.status.json"
    for text in ("", "[]", '{"other": 1}', "null", "\x00"):
        file.write_text(text)
        assert read_status(file) == StageStatus()
    write_status(tmp_path / "missing" / "x.status.json", StageStatus("text"))
    assert not (tmp_path / "missing").exists()
