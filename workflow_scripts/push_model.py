"""Upload a run's merged model to the Hugging Face hub, and write down where it is."""

from pathlib import Path

from adder.workflow.side_jobs import push_run

push_run(
    Path(snakemake.input[0]).parent,
    hub=snakemake.params.hub,
    private=snakemake.params.private,
    run=snakemake.wildcards.run,
    result=Path(snakemake.output[0]),
    log=Path(snakemake.log[0]),
)
