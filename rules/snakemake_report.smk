# What `snakemake --report` shows: the pages with what their captions say, and each run's main figures beside its report.
from adder.core.files import read_json


report: "captions/workflow.rst"


def shown_in_report(page):
    """A page of a run, flagged for Snakemake's own report."""

    def labels(wildcards):
        if page != "report.html":
            return {"run": wildcards.run, "page": page}
        found = read_json(Path(f"{RESULTS}/{wildcards.run}/metrics.json"))["verdict"]
        base, tuned, difference, low, high = (
            f"{value:.4g}" for value in (found["base"], found["tuned"], found["difference"], *found["ci95"])
        )
        figures = {"score": found["metric"], "base": base, "tuned": tuned, "rows": found["n"]}
        interval = {"difference (95 % interval)": f"{difference} ({low} to {high})"}
        return {"run": wildcards.run, **figures, **interval, "verdict": found["verdict"]}

    category = "Runs" if page == "report.html" else "Cards, figures, settings"
    caption = f"captions/{Path(page).stem}.rst"
    return report(f"{RESULTS}/{{run}}/{page}", caption=caption, category=category, labels=labels)
