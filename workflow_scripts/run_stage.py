"""From Snakemake's job to the package's stage: the one script of all stages."""

import json
from pathlib import Path

from adder.workflow.stage_runner import execute

# Inputs that aren't stages.
BESIDE = ("code", "request")
record = Path(snakemake.output.record)
execute(
    record.parents[1].name,
    json.loads(snakemake.params.stage),
    # Read from the configuration, not from params: what concerns the machine is no reason to run anything.
    runtime=snakemake.config.get("runtime"),
    inputs={parent: Path(path).parent for parent, path in snakemake.input.items() if parent not in BESIDE},
    results=record.parents[3],
    key=snakemake.wildcards.key,
    log=Path(snakemake.log[0]),
)
