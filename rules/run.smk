# What people look at, results/<run>/: a run's model and pages, its guard, its upload.


report: "captions/workflow.rst"


def shown_stages(run):
    """The stages that a run's folder is made of, by name."""
    return {name: stage for name, stage in RUNS[run].items() if name in run_folder.SHOWN}


def finished(wildcards):
    """Input function: the records of what a run's folder is made of, and the request for it."""
    stages = {name: f"{RESULTS}/{stage.folder}/stage.json" for name, stage in shown_stages(wildcards.run).items()}
    return {**stages, "request": f"{RESULTS}/cache/requests/{wildcards.run}.json"}


for run in RUNS:
    keys = {name: stage.key for name, stage in shown_stages(run).items()}
    run_folder.request(PLACE, run, keys, PLACE / run / run_folder.RECORD)


def to_be_pushed(wildcards):
    """Input function: what stands before an upload."""
    folder = f"{RESULTS}/{wildcards.run}"
    return [f"{folder}/merged_model/config.json", *([f"{folder}/guard.json"] if wildcards.run in GUARDED else [])]


def uploads(wildcards):
    """Input function: one record a run that names a repository of the hub."""
    runs = [run for run, settings in SETTINGS.items() if settings.export.hub]
    if not runs:
        raise WorkflowError("push: no run says where to; set export.hub to owner/name")
    return expand(f"{RESULTS}/{{run}}/pushed.json", run=runs)


def shown_in_report(page):
    """A page of a run, flagged for Snakemake's own report."""

    def labels(wildcards):
        if page != "report.html":
            return {"run": wildcards.run, "page": page}
        found = read_json(PLACE / wildcards.run / "metrics.json")["verdict"]
        base, tuned, difference, low, high = (
            f"{value:.4g}" for value in (found["base"], found["tuned"], found["difference"], *found["ci95"])
        )
        figures = {"score": found["metric"], "base": base, "tuned": tuned, "rows": found["n"]}
        interval = {"difference (95 % interval)": f"{difference} ({low} to {high})"}
        return {"run": wildcards.run, **figures, **interval, "verdict": found["verdict"]}

    category = "Runs" if page == "report.html" else "Cards, figures, settings"
    caption = f"captions/{Path(page).stem}.rst"
    return report(f"{RESULTS}/{{run}}/{page}", caption=caption, category=category, labels=labels)


rule link_run:
    input:
        unpack(finished),
    output:
        [shown_in_report(page) for page in side_jobs.PAGES],
        model=f"{RESULTS}/{{run}}/merged_model/config.json",
    log:
        f"{RESULTS}/logs/link/{{run}}.log",
    localrule: True
    conda:
        "../envs/adder.yaml"
    message:
        "Putting the results of run '{wildcards.run}' into their place"
    script:
        "../workflow_scripts/link_run.py"


rule check_guard:
    input:
        f"{RESULTS}/{{run}}/metrics.json",
    output:
        f"{RESULTS}/{{run}}/guard.json",
    log:
        f"{RESULTS}/logs/guard/{{run}}.log",
    localrule: True
    conda:
        "../envs/adder.yaml"
    message:
        "Comparing run '{wildcards.run}' with what it may lose elsewhere"
    script:
        "../workflow_scripts/check_guard.py"


rule push_run:
    input:
        to_be_pushed,
    output:
        f"{RESULTS}/{{run}}/pushed.json",
    log:
        f"{RESULTS}/logs/push/{{run}}.log",
    localrule: True
    conda:
        "../envs/adder.yaml"
    params:
        hub=lambda wildcards: SETTINGS[wildcards.run].export.hub,
        private=lambda wildcards: SETTINGS[wildcards.run].export.private,
        stages=lambda wildcards: [RUNS[wildcards.run][name].key for name in ("merge", "report")],
    message:
        "Uploading run '{wildcards.run}'"
    script:
        "../workflow_scripts/push_model.py"
