"""What code of the user's opens is seen, and held against what it is later."""

import json
import linecache
import os
import socket
import sqlite3
import subprocess
import tempfile

import pytest

from adder.core import opened_files
from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import digest_file


def test_what_is_opened_to_be_read_is_seen_in_whichever_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("open", "os", "bytes", "relative", "database", "both", "outside"):
        (tmp_path / name).write_text("")
    (tmp_path / "outside").read_text()
    with opened_files.watched() as watch:
        (tmp_path / "open").read_text()
        os.close(os.open(tmp_path / "os", os.O_RDONLY))
        open(os.fsencode(tmp_path / "bytes")).close()
        open("relative").close()
        sqlite3.connect(tmp_path / "database").close()
        open(tmp_path / "both", "r+").close()
        with pytest.raises(FileNotFoundError):
            (tmp_path / "absent").read_text()
        (tmp_path / "written").write_text("")
        (tmp_path / "written").read_text()
        with tempfile.TemporaryFile() as file:
            open(file.fileno(), closefd=False).close()
        open(json.__file__).close()  # Python's own
        open("/proc/self/stat").close()
        open(opened_files.__file__).close()
        linecache.clearcache()
        assert "What code of the user's" in linecache.getline(__file__, 1)  # as a warning shows it
    (tmp_path / "outside").read_text()
    opened = watch.opened
    assert {path.name for path in opened} == {"open", "os", "bytes", "relative", "database", "both", "absent"}
    assert opened[tmp_path / "absent"] is None and not watch.asked


def test_what_was_opened_is_told_by_digest_and_held_against_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digests = FileDigests(tmp_path / "digests.json", tmp_path)
    (tmp_path / "x").write_text("1")
    with opened_files.watched() as watch:
        (tmp_path / "x").read_text()
        with pytest.raises(FileNotFoundError):
            (tmp_path / "y").read_text()
    recorded = opened_files.digests_of(watch.opened, digests)
    assert recorded == {"x": digest_file(tmp_path / "x"), "y": opened_files.ABSENT}
    assert opened_files.changed(recorded, digests) == []
    (tmp_path / "x").unlink()
    (tmp_path / "y").touch()
    assert opened_files.changed(recorded, digests) == ["x", "y"]


def test_what_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "x").write_text("1")
    with opened_files.watched() as watch:
        (tmp_path / "x").read_text()
    (tmp_path / "x").write_text("2 and more")
    with pytest.raises(UserError, match=r"x: changed while being read"):
        opened_files.digests_of(watch.opened, FileDigests(tmp_path / "digests.json", tmp_path))


def test_what_no_digest_tells_of_is_named():
    with opened_files.watched() as watch:
        subprocess.run(["true"], check=True)
        with socket.socket() as asking, pytest.raises(ConnectionRefusedError):
            asking.connect(("127.0.0.1", 1))
    assert watch.asked == {"other programs", "the network"}
