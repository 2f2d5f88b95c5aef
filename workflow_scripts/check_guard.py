"""Fail a run whose score on a guarded task fell further than its settings allow. The report is written by then."""

import sys
from pathlib import Path

from adder.core.files import read_json, write_json
from adder.report import regression_guard

metrics = Path(snakemake.input[0])
found = regression_guard.check(read_json(metrics)["tasks"])
Path(snakemake.log[0]).write_text(f"{found['sentence']}\n", encoding="utf-8")
if not found["passed"]:
    report = metrics.with_name("report.html")
    sys.exit(f"guard: {found['sentence']} The model and {report} are there all the same.")
write_json(Path(snakemake.output[0]), found)
