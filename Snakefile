"""Adder: from instruction data and a base model to a merged, evaluated model. What can be asked for stands here."""

from snakemake.utils import min_version

min_version("9.0")


include: "rules/common.smk"
include: "rules/slurm.smk"
include: "rules/stages.smk"
include: "rules/run_inputs.smk"
include: "rules/run.smk"
include: "rules/compare.smk"


onsuccess:
    terminal_closing.show(RUNS, PLACE)


onerror:
    unfinished_runs.compare_finished(RUNS, PLACE)


rule merged_model:
    """The merged model of every run, with its report."""
    default_target: True
    input:
        expand(f"{RESULTS}/{{run}}/{{part}}", run=RUNS, part=["merged_model/config.json", *run_folder.PAGES]),
        expand(f"{RESULTS}/{{run}}/guard.json", run=GUARDED),


rule report:
    """The report of every run."""
    input:
        expand(f"{RESULTS}/{{run}}/{{part}}", run=RUNS, part=run_folder.PAGES),


rule compare:
    """All runs on one page, which links to their reports."""
    input:
        rules.report.input,
        f"{RESULTS}/compare.html",
        f"{RESULTS}/compare.csv",


rule push:
    """The merged models on the Hugging Face hub."""
    input:
        uploads,


rule all:
    """Everything that the configuration stands for, but uploads."""
    input:
        rules.merged_model.input,
        f"{RESULTS}/compare.html",
        f"{RESULTS}/compare.csv",
