"""Whoever writes to the results has them for itself, and says who it is."""

import errno
import os
import subprocess
import sys

import pytest

from adder.core import file_lock
from adder.core.errors import UserError


def test_a_second_one_is_refused_by_the_name_of_the_first_and_let_in_after_its_death(tmp_path):
    work = f"""
import sys, time
from pathlib import Path
from adder.core import file_lock
held = file_lock.take(Path({str(tmp_path / "results")!r}), 'another Snakemake')
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
    process.stdout.readline()
    told = rf"another Snakemake \(process {process.pid} on .+\) is writing to .*results/"
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(UserError, match=told):
            file_lock.take(tmp_path / "results", "another Snakemake")
    process.kill()
    process.wait()
    with file_lock.take(tmp_path / "results", "another Snakemake"):
        assert (tmp_path / "results" / ".lock").read_text().startswith(f"another Snakemake (process {os.getpid()} on ")
    with file_lock.take(tmp_path / "results", "another Snakemake"):
        assert (tmp_path / "results" / ".lock").read_text().count("process") == 1


def test_a_held_file_is_waited_for_and_never_had_by_two(tmp_path):
    """Each of four processes adds one to a number, 50 times; the file that they lock comes and goes meanwhile."""
    work = """
import sys
from pathlib import Path
from adder.core import file_lock
number = Path("number")
for _ in range(50):
    with file_lock.held(Path("folder/.lock"), lambda who: None):
        number.write_text(str(int(number.read_text()) + 1))
"""
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", work], cwd=tmp_path) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "200" and not list((tmp_path / "folder").iterdir())


def test_who_has_a_file_is_told_and_may_be_refused(tmp_path):
    def refuse(who: str) -> None:
        raise UserError(who)

    with file_lock.held(tmp_path / "a", refuse) as waited:
        assert not waited
        with (
            pytest.raises(UserError, match=rf"^another process \(process {os.getpid()} on .+\)$"),
            file_lock.held(tmp_path / "a", refuse),
        ):
            pass
        assert (tmp_path / "a").exists()
    assert not (tmp_path / "a").exists()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    """Other errors of the call are errors."""

    def answers(number: int):
        def flock(*_):
            raise OSError(number, "no")

        return flock

    monkeypatch.setattr(file_lock.fcntl, "flock", answers(errno.ENOSYS))
    with file_lock.take(tmp_path, "another Snakemake"), file_lock.held(tmp_path / "one", pytest.fail) as waited:
        assert not waited
    monkeypatch.setattr(file_lock.fcntl, "flock", answers(errno.EIO))
    with pytest.raises(OSError, match="no"):
        file_lock.take(tmp_path, "another Snakemake")
