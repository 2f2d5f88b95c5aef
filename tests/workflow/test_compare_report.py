"""The comparison of runs as the workflow makes it, and Snakemake's own report of the same figures."""

import csv
import io
import json
import re
import zipfile

from project import OTHER

RUNS = {"runs": {"default": {}, "other": OTHER}}


def test_runs_are_compared_and_snakemake_reports_the_same_figures(project):
    project.run("merged_model", "compare", config=RUNS)
    results = project.folder / "results"
    rows = list(csv.DictReader(io.StringIO((results / "compare.csv").read_text())))
    assert {row["run"] for row in rows} == {"default", "other"}
    assert {row["train.learning_rate"] for row in rows} == {"0.0001", "0.05"}
    for row in rows:
        heldout = project.result("metrics.json", row["run"])["heldout"]
        assert float(row["loss"]) == heldout["loss"]["tuned"]["value"]
        assert f'href="./{row["run"]}/report.html"' in (results / "compare.html").read_text()
    assert "Nothing to be done" in project.snakemake("-n", "merged_model", "compare", config=RUNS)

    # Whoever asks the network is sent where nobody answers.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = ("-m", "snakemake", "--report", "report.zip", "all", "--cores", "1")
    done = project.python(*command, variables=nowhere)
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(project.folder / "report.zip") as made:
        shown = [made.read(name) for name in made.namelist() if name.startswith("report/data/")]
        page = made.read("report/report.html").decode()
    pages = [f"{run}/{name}" for run in ("default", "other") for name in ("report.html", "card.md", "metrics.json")]
    for name in [*pages, "compare.html", "compare.csv"]:
        assert (results / name).read_bytes() in shown, name
    entries = json.loads(re.search(r"var results = (\{.*\});", page).group(1))
    for run in ("default", "other"):
        entry, verdict = entries[f"results/{run}/report.html"], project.result("metrics.json", run)["verdict"]
        assert entry["labels"]["tuned"] == f"{verdict['tuned']:.4g}" and entry["labels"]["rows"] == verdict["n"]
        assert f"The report of run <strong>{run}</strong>" in entry["caption"]
    project.run()  # the other tests go on with one run
