"""The kernels' own tests by Triton's interpreter, on machines without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def test_every_kernel_is_its_reference_by_the_interpreter():
    """In a process of its own: the interpreter takes the place of Triton's compiler where kernels are declared."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "interpreted", str(HERE)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    found = re.search(r"(\d+) passed", run.stdout)
    assert found is not None and int(found[1]) > 100 and "failed" not in run.stdout
