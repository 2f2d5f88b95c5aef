"""Let another model compare the replies of base and tuned model."""

from job import run

run(snakemake, "judge", module="adder.evaluation.judge")
