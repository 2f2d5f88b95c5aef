"""Merge the adapter into the base and prove that the merged model is what was trained."""

from job import run

run(snakemake, "merge", module="adder.merging.run")
