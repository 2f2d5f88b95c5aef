"""Whoever writes to the results has them for itself, and says who it is."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adder.core import file_lock
from adder.core.errors import UserError
from adder.core.file_lock import EXIT_STATUS

# A holder: in its own words, as a process of another host where `machine` is given.
HOLDER = """
import sys, time
from pathlib import Path
from adder.core import file_lock
path, machine, beat = sys.argv[1:]
if machine:
    file_lock._machine = lambda: machine
    file_lock.socket.gethostname = lambda: machine
file_lock.BEAT = float(beat)
with file_lock.held(Path(path), lambda who: print("waits for", who, flush=True)) as waited:
    print("held", waited, flush=True)
    sys.stdin.readline()
print("let go", flush=True)
"""


class Holder:
    """A process that holds the lock `path` until told to let go; elsewhere: the name of another host that it is on."""

    def __init__(self, path: Path, elsewhere: str = "", beat: float = 0.05):
        command = [sys.executable, "-c", HOLDER, str(path), elsewhere, str(beat)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def hold():
    holders: list[Holder] = []

    def start(*arguments, **options) -> Holder:
        holders.append(Holder(*arguments, **options))
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        for pipe in (holder.process.stdin, holder.process.stdout, holder.process.stderr):
            pipe.close()


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
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # what is left of it is a zombie
    me = rf"another Snakemake \(process {os.getpid()} on "
    with file_lock.take(tmp_path / "results", "another Snakemake"), pytest.raises(UserError, match=me):
        file_lock.take(tmp_path / "results", "another Snakemake")
    process.wait()
    with file_lock.take(tmp_path / "results", "another Snakemake"):
        assert (tmp_path / "results" / ".lock").read_text().startswith(f"another Snakemake (process {os.getpid()} on ")
    assert not list((tmp_path / "results").iterdir())


def test_a_process_that_ends_leaves_no_lock_to_others_hosts(tmp_path):
    work = f"""
from pathlib import Path
from adder.core import file_lock
lease = file_lock.take(Path({str(tmp_path)!r}), "another Snakemake")
"""
    subprocess.run([sys.executable, "-c", work], check=True)
    assert not list(tmp_path.iterdir())


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


def test_of_many_that_see_a_dead_one_one_takes_over_at_a_time(tmp_path):
    """Each of four processes adds to a number and dies with the lock, 20 times: the next has to take it over."""
    work = """
import os
from pathlib import Path
from adder.core import file_lock
number = Path("number")
for _ in range(20):
    if not (child := os.fork()):
        with file_lock.held(Path("folder/.lock"), lambda who: None):
            number.write_text(str(int(number.read_text()) + 1))
            os._exit(0)
    os.waitpid(child, 0)
"""
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", work], cwd=tmp_path) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "80"
    with file_lock.held(tmp_path / "folder" / ".lock", pytest.fail) as waited:
        assert not waited
    assert not list((tmp_path / "folder").iterdir())


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


def test_a_living_holder_on_another_host_is_waited_for_by_name_and_batch_job(tmp_path, hold, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = hold(tmp_path / "lock", elsewhere="node1")
    assert first.line() == "held False"
    monkeypatch.delenv("SLURM_JOB_ID")
    second = hold(tmp_path / "lock", elsewhere="node2")
    process = first.process.pid
    assert second.line() == f"waits for another process (process {process} on node1, Slurm job 7)"
    first.let_go()
    assert (first.line(), second.line()) == ("let go", "held True")
    second.let_go()
    assert second.line() == "let go" and not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(file_lock, "STALE", 0.6)
    monkeypatch.setattr(file_lock, "WATCHED", 0.3)


def test_a_lease_that_is_no_longer_renewed_is_taken_over_and_one_that_is_is_not(tmp_path, hold, quick):
    path, told = tmp_path / "results" / ".lock", []
    other = hold(path, elsewhere="node1")
    assert other.line() == "held False"
    time.sleep(1.2)  # twice as long as a lease lives, but it is renewed
    with pytest.raises(
        UserError, match=r"on node1\) is writing to .+results/; .+; if node1 is lost, start again in two"
    ):
        file_lock.take(path.parent, "another Snakemake")
    other.kill()  # as with its host: nobody here can see that it is gone
    with file_lock.held(path, told.append) as waited:
        assert waited and told and "node1" in told[0]
    assert not list(path.parent.iterdir())


def test_a_clock_that_jumps_takes_no_lease_from_the_living(tmp_path, hold, monkeypatch):
    """Its time stamp is old, as after a jump, but it is renewed before our eyes."""
    monkeypatch.setattr(file_lock, "STALE", 0.2)
    monkeypatch.setattr(file_lock, "WATCHED", 0.6)
    monkeypatch.setattr(file_lock, "_age", lambda seen: 3600.0)
    other = hold(tmp_path / "lock", elsewhere="node1")
    assert other.line() == "held False"
    threading.Timer(1.5, other.let_go).start()  # it would have been taken twice over by then
    with file_lock.held(tmp_path / "lock", pytest.fail):
        assert other.line() == "let go"


def test_a_holder_whose_lease_went_to_another_ends_before_it_writes_more(tmp_path, hold, quick):
    """A host that hung comes back: another has taken over by then."""
    path = tmp_path / "lock"
    first = hold(path, elsewhere="node1", beat=0.3)
    assert first.line() == "held False"
    os.kill(first.process.pid, 19)  # SIGSTOP
    with file_lock.held(path, lambda who: None):
        os.kill(first.process.pid, 18)  # SIGCONT
        assert first.process.wait(timeout=20) == EXIT_STATUS
        told = first.process.stderr.read()
        assert re.search(
            rf"was not heard of for too long; it is another process \(process {os.getpid()} on .+ending", told
        )
        assert file_lock._last(path).holder.process == os.getpid()
    assert not list(tmp_path.iterdir())


def test_an_id_that_a_later_process_has_is_not_its_holder(tmp_path):
    own = file_lock._Holder.this_process("another process")
    assert own.is_here and own.is_alive
    earlier = json.dumps({**own.__dict__, "started": "1", "token": "gone"})
    (tmp_path / "lock").write_text(f"an earlier one\n{earlier}\n")
    with file_lock.held(tmp_path / "lock", pytest.fail) as waited:
        assert not waited
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_links_keeps_others_out_as_well(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file_lock.os, "link", refuse)
    with file_lock.take(tmp_path, "one"), pytest.raises(UserError, match="one .* is writing"):
        file_lock.take(tmp_path, "another")
    assert not list(tmp_path.iterdir())


def test_a_lease_that_says_nothing_is_somebody_elses(tmp_path, quick):
    """One that is being filled, or was when its host was lost."""
    path, told = tmp_path / "lock", []
    path.touch()
    with file_lock.held(path, told.append) as waited:
        assert waited and told == ["another process"]
    assert not list(tmp_path.iterdir())
