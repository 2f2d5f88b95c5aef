"""Users that containers and clusters have: without a name, without a home that can be written."""

import os
import shutil
import subprocess
import sys

import pytest

from project import ROOT

# As a user of whom nothing is known, who may read and write all the same.
NAMELESS = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
SNAKEMAKE = (sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n", "--cores", "1")


@pytest.fixture
def environment() -> dict[str, str]:
    if shutil.which("make") is None or subprocess.run([*NAMELESS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no make here, or no namespace for a user without a name")
    names = ("LOGNAME", "USER", "USERNAME", "LNAME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"HOME": "/proc/nowhere", "PYTHONPATH": str(ROOT / "workflow_scripts")}


def test_make_gives_snakemake_a_name_and_a_home(environment, tmp_path):
    for folder in (".test/config", "config"):
        shutil.copytree(ROOT / ".test" / "config", tmp_path / folder, dirs_exist_ok=True)
    command = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), "--eval", "try: ; @$(COMMAND)", "try"]
    whole = {**environment, "COMMAND": " ".join(SNAKEMAKE)}
    done = subprocess.run([*NAMELESS, *command], cwd=tmp_path, env=whole, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "jobs would run" in done.stdout and (tmp_path / ".cache" / "home").is_dir()
