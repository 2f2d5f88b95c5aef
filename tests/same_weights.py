"""Build the default run at two commits on this machine and compare the adapter's and the merged model's bytes.

Usage: python tests/same_weights.py OLD NEW [CONFIG.yaml]     (some 15 minutes on two cores; 1 where they differ)

For changes that must not change a number. Run it with the environment that both commits need; each checkout's own
package is used.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ("adapter/adapter_model.safetensors", "merged_model/model.safetensors")


def build(commit: str, folder: Path, config: list[str]) -> dict[str, str]:
    """Run the workflow of `commit` in `folder`; return the SHA-256 of each file of weights."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "-q", commit], cwd=folder, check=True)
    environment = os.environ | {"PYTHONPATH": str(folder / "workflow_scripts")}
    command = [sys.executable, "-m", "snakemake", "merged_model", "--cores", "1", *config]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    run = folder / "results" / "default"
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in WEIGHTS}


def main(old: str, new: str, *config: str) -> int:
    """Compare the commits; print a line a file."""
    options = ["--configfile", str(Path(config[0]).resolve())] if config else []
    with tempfile.TemporaryDirectory() as folder:
        before = build(old, Path(folder) / "old", options)
        after = build(new, Path(folder) / "new", options)
    for name, digest in before.items():
        verdict = "the same bytes" if after[name] == digest else "DIFFERENT"
        print(f"{name}: {verdict} ({digest[:16]}, {after[name][:16]})")
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
