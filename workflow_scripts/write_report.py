"""Write report.html, card.md, model_card.md, metrics.json and run.yaml from what the stages left."""

from job import run

run(snakemake, "report", module="adder.report.run")
