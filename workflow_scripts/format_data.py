"""Turn rows into conversations, split off the held-out ones, account for every row."""

from job import run

run(snakemake, "format", module="adder.formatting.run")
