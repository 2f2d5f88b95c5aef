"""Whatever goes wrong on the way, a workflow ends with the same bytes: short forms of docs/reliability.md's figures."""

import subprocess
import sys

from project import ROOT


def said_last(script: str, *arguments: str) -> str:
    """The last line of what one of the scripts in tests/ says; it must end well."""
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout.splitlines()[-1]


def test_kills_and_full_disks_change_nothing():
    """A kill of each stage, at a random moment or operation on files, and a few starts without room."""
    assert "every result the same" in said_last("faults.py", "kills=14", "full=4")


def test_no_row_and_no_configuration_ends_in_a_traceback():
    """More of both, and from the bytes on, than the tests of single modules try."""
    assert "no traceback" in said_last("fuzz.py", "rows=400", "configurations=300")
