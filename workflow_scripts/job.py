"""From Snakemake's job to the package's stage: the one place that knows both."""

import json
from pathlib import Path

from adder.workflow import stage_runner as stage


def run(snakemake, name: str, module: str, function: str = "run") -> None:
    """Run the stage `name` of a job: its parents' folders in, the folder of its output out."""
    parameters = json.loads(snakemake.params.stage)
    output = Path(snakemake.output.record)
    stage.execute(
        name,
        module,
        parameters["settings"],
        {parent: Path(path).parent for parent, path in snakemake.input.items() if parent != "code"},
        results=output.parents[3],
        key=snakemake.wildcards.key,
        log=Path(snakemake.log[0]),
        function=function,
        # Read from the configuration, not from params: what concerns the machine is no reason to run anything.
        runtime=snakemake.config.get("runtime"),
        identity=parameters["identity"],
    )
