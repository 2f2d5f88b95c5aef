"""Fetch the rows from files, URLs, the hub or the built-in generator: `rows.jsonl`, `reading.json`, `sources.json`."""

from job import run

run(snakemake, "data", module="adder.data.fetch", function="run_data")
