"""The notebook of config/examples runs to its end, on the finished tiny run."""

from pathlib import Path

import nbformat
import pytest

from project import ROOT, Project

NOTEBOOK = ROOT / "config" / "examples" / "before-and-after.ipynb"


def test_it_is_kept_without_what_a_run_of_it_showed():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_runs_to_its_end(project: Project):
    nbclient = pytest.importorskip("nbclient", reason="nbclient isn't installed")
    pytest.importorskip("ipykernel", reason="ipykernel isn't installed")
    project.configure()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(project.folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
    client.execute(env=project.environment | {"CONFIG": str(Path("config") / "config.yaml")})
    shown = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert "results/default/report.html" in shown[3]
    assert project.result("metrics.json")["verdict"]["sentence"] in shown[5] and "exact_match" in shown[5]
    assert "before:\n" in shown[7] and "after:\n" in shown[7]
