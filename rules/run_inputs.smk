# What the rules of run.smk read, and what Snakemake's own report shows of it.


def shown_stages(run):
    """The stages that a run's folder is made of, by name."""
    return {name: stage for name, stage in RUNS[run].items() if name in run_folder.SHOWN}


def finished(wildcards):
    """Input function: the records of what a run's folder is made of, and the request for it."""
    return {**records_of(shown_stages(wildcards.run)), "request": f"{RESULTS}/cache/requests/{wildcards.run}.json"}


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
