"""What jobs write by themselves goes to a file, what this process writes to the terminal."""

import os
import subprocess
import sys
from pathlib import Path

from adder.workflow.terminal import job_stderr


def test_a_child_writes_to_the_log_and_this_process_to_the_terminal(tmp_path, capfd):
    log = tmp_path / "logs" / "jobs.log"
    with job_stderr.kept_in(log) as terminal:
        subprocess.run([sys.executable, "-c", "import sys; print('a traceback', file=sys.stderr)"], check=True)
        print("ours", file=sys.stderr)
        terminal.write("the story\n")
        assert sys.stderr is terminal
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "ours\nthe story\nafterwards\n" and log.read_text() == "a traceback\n"
    assert job_stderr.last_words(log) == "a traceback"


def test_without_a_place_for_the_log_all_stays_as_it_was(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    before = sys.stderr
    with job_stderr.kept_in(tmp_path / "file" / "log") as terminal:
        assert terminal is before is sys.stderr
    assert job_stderr.last_words(Path(tmp_path / "none")) == ""
