"""Whoever writes to the results has them for itself, and says who it is."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.workflow import lock


def test_a_second_one_is_refused_by_the_name_of_the_first_and_let_in_after_its_death(tmp_path):
    work = f"""
import sys, time
from pathlib import Path
from adder.workflow import lock
held = lock.take(Path({str(tmp_path / "results")!r}))
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
    process.stdout.readline()
    told = rf"another Snakemake \(process {process.pid} on .+\) is writing to .*results/"
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(UserError, match=told):
            lock.take(tmp_path / "results")
    process.kill()
    process.wait()
    with lock.take(tmp_path / "results"):
        assert (tmp_path / "results" / ".lock").read_text().startswith(f"another Snakemake (process {os.getpid()} on ")
    with lock.take(tmp_path / "results"):
        assert (tmp_path / "results" / ".lock").read_text().count("process") == 1


def test_a_held_file_is_waited_for_and_never_had_by_two(tmp_path):
    """Each of four processes adds one to a number, 50 times; the file that they lock comes and goes meanwhile."""
    work = """
import sys
from pathlib import Path
from adder.workflow import lock
number = Path("number")
for _ in range(50):
    with lock.held(Path("folder/.lock"), lambda who: None):
        number.write_text(str(int(number.read_text()) + 1))
"""
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", work], cwd=tmp_path) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "200" and not list((tmp_path / "folder").iterdir())


def test_who_has_a_file_is_told_and_may_be_refused(tmp_path):
    def refuse(who: str) -> None:
        raise UserError(who)

    with lock.held(tmp_path / "a", refuse) as waited:
        assert not waited
        with (
            pytest.raises(UserError, match=rf"^another process \(process {os.getpid()} on .+\)$"),
            lock.held(tmp_path / "a", refuse),
        ):
            pass
        assert (tmp_path / "a").exists()
    assert not (tmp_path / "a").exists()


@pytest.fixture
def prune(tmp_path):
    """Run `make prune` for a configuration with nobody at the keyboard; return its exit status and what it says."""
    (tmp_path / "my.yaml").write_text("model: {source: a/b}\ndata: {sources: [{builtin: tickets, rows: 9}]}\n")
    script = Path(lock.__file__).parents[2] / "prune.py"

    def run(*arguments: str) -> tuple[int, str]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([sys.executable, script, "my.yaml", *arguments], cwd=tmp_path, **streams)
        return done.returncode, done.stdout

    return run


def test_prune_refuses_while_a_snakemake_writes_or_a_job_that_outlived_one(tmp_path, prune):
    unneeded = tmp_path / "results" / "stages" / "format" / ("0" * 12)
    unneeded.mkdir(parents=True)
    me = rf"\(process {os.getpid()} on .+\)"
    with lock.take(tmp_path / "results"):
        code, told = prune("--yes")
    assert code == 1
    assert re.fullmatch(rf"prune: another Snakemake {me} is writing to results/; wait for it, or end it\n", told)
    with lock.held(unneeded.with_name(".abc.lock"), print):
        code, told = prune("--yes")
    assert code == 1
    place = "results/stages/format/abc"
    assert re.fullmatch(rf"prune: another process {me} is still at work on {place}; wait for it, or end it\n", told)
    assert unneeded.exists()
    left = unneeded.with_name(".killed.lock")
    left.write_text("another process (process 1 on somewhere)")
    assert prune("--yes")[0] == 0 and not unneeded.exists() and not left.exists()


def test_prune_takes_nobody_there_for_a_no_and_makes_no_results(tmp_path, prune):
    assert prune() == (0, "Nothing to prune: there is no results/.\n")
    assert not (tmp_path / "results").exists()
    unneeded = tmp_path / "results" / "stages" / "format" / ("0" * 12)
    unneeded.mkdir(parents=True)
    code, told = prune()
    assert code == 0 and told.endswith("Remove them? [y/N] \nNothing was removed.\n") and unneeded.exists()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    """Other errors of the call are errors."""

    def answers(number: int):
        def flock(*_):
            raise OSError(number, "no")

        return flock

    monkeypatch.setattr(lock.fcntl, "flock", answers(errno.ENOSYS))
    with lock.take(tmp_path), lock.held(tmp_path / "one", pytest.fail) as waited:
        assert not waited
    monkeypatch.setattr(lock.fcntl, "flock", answers(errno.EIO))
    with pytest.raises(OSError):
        lock.take(tmp_path)
