"""Whoever writes to the results has them for itself, and says who it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adder import lock
from adder.errors import UserError


def test_a_second_one_is_refused_by_the_name_of_the_first_and_let_in_after_its_death(tmp_path):
    work = f"""
import sys, time
sys.path.insert(0, {str(Path(lock.__file__).parents[1])!r})
from pathlib import Path
from adder import lock
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
        assert (tmp_path / "results" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with lock.take(tmp_path / "results"):
        assert (tmp_path / "results" / ".lock").read_text().count("process") == 1
