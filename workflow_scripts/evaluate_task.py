"""Measure one model on one task of lm-eval's or of the user's."""

from job import run

run(snakemake, "task", module="adder.evaluation.tasks.run")
