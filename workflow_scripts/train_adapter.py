"""Train on the packs: adapter, curves, and the plan that the hardware led to. Continues a killed run."""

from job import run

run(snakemake, "train", module="adder.training.run")
