"""Fetch the rows: from files or the built-in generator to `rows.jsonl` and `sources.json`."""

from job import run

run(snakemake, "data", module="download", function="run_data")
