"""Put a run's model and pages where people look, `results/<run>/`."""

import json
from pathlib import Path

from adder.workflow.side_jobs import link_run

run = Path(snakemake.output.model).parents[1]
link_run(
    {name: run.parent / folder for name, folder in json.loads(snakemake.params.stages).items()},
    run,
    Path(snakemake.log[0]),
)
