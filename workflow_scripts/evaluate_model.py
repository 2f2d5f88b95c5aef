"""Measure one model on the held-out rows: loss, perplexity, replies and their scores."""

from job import run

run(snakemake, "evaluate", module="adder.evaluation.run")
