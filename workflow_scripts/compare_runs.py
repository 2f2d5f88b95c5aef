"""Compare all runs of the configuration on one page and in one table: `compare.html` and `compare.csv`."""

import json
from pathlib import Path

from adder.workflow.side_jobs import compare_runs

runs = json.loads(snakemake.params.runs)
compare_runs(
    {run: {stage: Path(folder) for stage, folder in stages.items()} for run, stages in runs.items()},
    Path(snakemake.output.page).parent,
    Path(snakemake.input.request),
    Path(snakemake.log[0]),
)
