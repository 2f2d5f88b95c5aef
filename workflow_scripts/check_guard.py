"""Fail a run whose score on a guarded task fell further than its settings allow. The report is written by then."""

from pathlib import Path

from adder.workflow.side_jobs import check_guard

check_guard(Path(snakemake.input[0]), Path(snakemake.output[0]), Path(snakemake.log[0]))
