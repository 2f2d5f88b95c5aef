"""Put a run's model and pages where people look, `results/<run>/`."""

from pathlib import Path

from adder.workflow.run_folder import SHOWN
from adder.workflow.side_jobs import link_run

link_run(
    {name: Path(record).parent for name, record in snakemake.input.items() if name in SHOWN},
    Path(snakemake.output.model).parents[1],
    Path(snakemake.log[0]),
)
