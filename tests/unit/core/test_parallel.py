"""Batches over workers: results in order, no more work taken on than is under way, errors passed on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from adder.core.parallel import AHEAD, map_batches, worker_count


def square():
    return lambda number: (number * number, os.getpid())


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_batches(workers):
    found = list(map_batches(square, range(20), workers))
    assert [value for value, _ in found] == [number * number for number in range(20)]
    assert ({pid for _, pid in found} == {os.getpid()}) == (workers == 1)


def test_no_more_batches_are_taken_than_the_workers_have_under_way():
    taken = []

    def batches():
        for number in range(40):
            taken.append(number)
            yield number

    results = map_batches(square, batches(), 2)
    next(results)
    assert len(taken) <= 2 * AHEAD
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_is_raised_here(workers):
    def make():
        return lambda number: 1 // number

    with pytest.raises(ZeroDivisionError):
        list(map_batches(make, [1, 0, 1], workers))


def test_workers_are_as_many_as_the_work_and_the_threads_are_worth(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert worker_count(1_000, 100, 4) == 4
    assert worker_count(250, 100, 4) == 2
    assert worker_count(0, 100, 4) == worker_count(1_000, 100, 1) == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    assert worker_count(1_000, 100, 4) == 1


PARENT = """
import subprocess, sys
from adder.core.parallel import die_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=die_with_parent)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can be asked for it")
def test_a_child_does_not_outlive_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if _is_zombie(child):
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def _is_zombie(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split(")")[1].split()[0] == "Z"
    except OSError:
        return True
