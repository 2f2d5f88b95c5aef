# All runs on one page and in one table.

if workflow.is_main_process:
    with told_in_one_sentence():
        requests.ask_for_comparison(PLACE, {run: stages["report"].key for run, stages in RUNS.items()})


rule compare_runs:
    input:
        [f"{RESULTS}/{stages['report'].folder}/stage.json" for stages in RUNS.values()],
        request=f"{RESULTS}/cache/requests/.compare.json",
        # An edit to one of them makes the page anew; of stages, their requests tell that.
        code=[str(path) for path in closure("adder.report.comparison.page")],
    output:
        page=report(
            f"{RESULTS}/compare.html",
            caption="captions/compare.rst",
            category="All runs",
            labels={"page": "Comparison"},
        ),
        table=report(
            f"{RESULTS}/compare.csv",
            caption="captions/table.rst",
            category="All runs",
            labels={"page": "Table (CSV)"},
        ),
    log:
        f"{RESULTS}/logs/compare.log",
    localrule: True
    conda:
        "../envs/adder.yaml"
    params:
        # As text, in which the order of the YAML's keys has no part.
        runs=canonical(
            {run: {name: str(PLACE / stage.folder) for name, stage in stages.items()} for run, stages in RUNS.items()}
        ),
    message:
        "Comparing the runs"
    script:
        "../workflow_scripts/compare_runs.py"
