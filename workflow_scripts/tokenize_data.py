"""Turn conversations into token ids, and labels where the assistant speaks."""

from job import run

run(snakemake, "tokenize", module="adder.tokenization.run")
