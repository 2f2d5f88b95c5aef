"""From Snakemake's job to the package's stage: the one script of all stages."""

import json
import signal
import sys
from pathlib import Path

# What follows takes a second to import; a Ctrl-C in it has nothing to tidy up. The stage has a way of its own.
interrupted = signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))

from adder.workflow.stage_runner import execute  # noqa: E402 - what is above is for the time that this takes

record = Path(snakemake.output.record)
signal.signal(signal.SIGINT, interrupted)
execute(
    record.parents[1].name,
    json.loads(snakemake.params.stage),
    # Read from the configuration, not from params: what concerns the machine is no reason to run anything.
    runtime=snakemake.config.get("runtime"),
    inputs={parent: record.parents[3] / folder for parent, folder in json.loads(snakemake.params.inputs).items()},
    results=record.parents[3],
    key=snakemake.wildcards.key,
    log=Path(snakemake.log[0]),
)
