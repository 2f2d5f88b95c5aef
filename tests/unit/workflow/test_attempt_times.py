"""What earlier attempts took is known to the next, however they ended."""

import json
import subprocess
import sys
import time

from adder.workflow import attempt_times


def test_an_attempt_is_counted_up_to_the_kill_that_it_could_not_hear(tmp_path):
    work = """
import sys, time
from adder.workflow import attempt_times
from pathlib import Path
attempt_times.INTERVAL = 0.05
with attempt_times.counted(Path("spent.json"), time.monotonic()):
    print("begun", flush=True)
    time.sleep(60)
"""
    for number in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", work], cwd=tmp_path, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.5)
        process.kill()
        process.wait()
        seconds = json.loads((tmp_path / "spent.json").read_text())
        assert len(seconds) == number and all(0.2 < one < 5 for one in seconds)


def test_an_account_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "spent.json").write_text("[1.5, ")
    with attempt_times.counted(tmp_path / "spent.json", time.monotonic()) as earlier:
        assert earlier == []
