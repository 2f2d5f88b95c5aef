"""What runs after which change: the table of docs/caching.md, tried with real dry runs and real runs."""

import json
import os
import re
import shutil

import pytest

from adder.workflow.stages import SPECS
from project import OTHER, ROOT, write_rows

ALL = SPECS.keys() - {"task", "judge", "gguf"}  # those that a configuration asks for
TABLE = ROOT / "docs" / "caching.md"


def documented() -> dict[str, str]:
    """The rows of the table in docs/caching.md: {change: stages that have a job}."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|[^|]*\|$", TABLE.read_text(), flags=re.MULTILINE)
    return {change.strip(): stages.strip() for change, stages in rows if not set(change) <= set("-: ")}


def shown(jobs: dict[str, int]) -> str:
    """Jobs as the table shows them."""
    names = [name if count == 1 else f"{name} ×{count}" for name, count in jobs.items()]
    order = list(SPECS)
    return ", ".join(sorted(names, key=lambda name: order.index(name.split()[0]))) or "nothing"


@pytest.fixture
def untouched(project):
    """Undo, after a test, what it did to the project's files and data."""
    kept = {path: path.read_bytes() for path in project.folder.rglob("*.py")}
    kept[project.folder / "rows.jsonl"] = (project.folder / "rows.jsonl").read_bytes()
    yield project
    for path, content in kept.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


def test_the_first_run_runs_everything(first_run, project):
    assert first_run.stages == dict.fromkeys(ALL, "ran")
    folder = project.folder / "results" / "default"
    made = {
        "merged_model",
        "adapter",
        "report.html",
        "card.md",
        "metrics.json",
        "run.yaml",
        "stages.json",
        "files.json",
    }
    assert {path.name for path in folder.iterdir()} == made


CHANGES = {
    "nothing": {},
    "`train.learning_rate`": {"train": {"learning_rate": 3e-4}},
    "`train.lora_r`": {"train": {"lora_r": 8}},
    "`data.heldout.share`": {"data": {"heldout": {"share": 0.3}}},
    "`format.system_prompt`": {"format": {"system_prompt": "Be brief."}},
    "`lengths.max_seq_length`": {"lengths": {"max_seq_length": 256}},
    "`evaluate.max_new_tokens`": {"evaluate": {"max_new_tokens": 16}},
    "`merge.base`": {"merge": {"base": "original"}},
    "a task more in `evaluate.tasks`": {"evaluate": {"tasks": [{"name": "gsm8k"}]}},
    "`evaluate.judge`": {"evaluate": {"judge": {"base_url": "http://localhost:1/v1", "model": "judge"}}},
    "`export.gguf`": {"export": {"gguf": "q8_0"}},
    "`report.title`": {"report": {"title": "Mine"}},
    "`model.source`": {"model": {"source": "other-model"}},
    "anything under `runtime`": {"runtime": {"threads": 1, "checkpoints": 3}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_setting(project, name, tmp_path_factory):
    if name == "`model.source`" and not (project.folder / "other-model").exists():
        from tiny import save_tiny_model

        save_tiny_model(project.folder / "other-model", seed=1)
    assert shown(project.planned(CHANGES[name])) == documented()[name]


def test_a_second_run_shares_what_it_can(project):
    runs = {"runs": {"default": {}, "other": {"train": {"learning_rate": 3e-4}}}}
    # The second run's own stages; the evaluation is that of its merged model: the base's is shared.
    assert shown(project.planned(runs)) == documented()["a second run with another learning rate"]


def test_yaml_in_another_order_with_comments(project):
    path = project.configure()
    blocks = [block for block in re.split(r"(?m)^(?=\w)", path.read_text()) if block]
    path.write_text("# a comment\n" + "".join(reversed(blocks)))
    assert "Nothing to be done" in project.python("-m", "snakemake", "-n", "merged_model", "--cores", "1").stdout
    assert documented()["keys reordered, comments"] == "nothing"


def test_touched_data_file(untouched):
    (untouched.folder / "rows.jsonl").touch()
    assert shown(untouched.planned()) == documented()["data file touched"] == "nothing"


def test_a_row_added(untouched):
    write_rows(untouched.folder / "rows.jsonl", 1, start=1000)
    assert shown(untouched.planned()) == documented()["a row added to the data file"]


CODE = {
    "report code": ("report/run.py", "lengths"),
    "packing code": ("packing/best_fit_decreasing.py", None),
    "training code": ("training/run.py", None),
    "formatting code": ("formatting/run.py", None),
}


@pytest.mark.parametrize("name", CODE)
def test_edited_code(untouched, name):
    path = untouched.folder / "workflow_scripts" / "adder" / CODE[name][0]
    path.write_text(path.read_text() + "\n\nNEW = 1\n")
    assert shown(untouched.planned()) == documented()[name]


def test_a_run_folder_follows_its_configuration_whatever_snakemake_remembers(project):
    """A → B → A, with .snakemake removed in between: all stages are there, and the folder must be A's again."""
    title = {"report": {"title": "Another title"}}
    page = project.folder / "results" / "default" / "report.html"
    project.run(config=title)
    assert "Another title" in page.read_text()
    shutil.rmtree(project.folder / ".snakemake")
    assert set(project.run().values()) <= {"restored"}  # of what other tests have touched
    assert "Another title" not in page.read_text()
    assert "Nothing to be done" in project.snakemake("merged_model")


def test_an_upgrade_is_said_before_the_first_job(project):
    records = {path: path.read_text() for path in project.folder.glob("results/stages/merge/*/stage.json")}
    for record, before in records.items():
        made = json.loads(before)
        record.write_text(json.dumps({**made, "versions": {**made["versions"], "peft": "0.1"}}))
    try:
        said = project.snakemake("merged_model", config={"report": {"title": "Mine"}})
    finally:
        for record, before in records.items():
            record.write_text(before)
    assert f"adder: merge: made with peft 0.1; {made['versions']['peft']} is installed" in said
    assert "evaluate: restored" in said or "evaluate: done" not in said


def test_a_comment_in_the_formatting_code_runs_nothing(untouched):
    untouched.run()  # whatever other tests left
    path = untouched.folder / "workflow_scripts" / "adder" / "formatting" / "run.py"
    path.write_text(path.read_text() + "\n# a comment\n")
    assert shown(untouched.planned()) == documented()["a comment in any code"] == "nothing"


def test_code_that_changes_no_output_stops_there(untouched):
    """The formatting code does something else and writes the same: it runs, and all below is restored."""
    path = untouched.folder / "workflow_scripts" / "adder" / "formatting" / "run.py"
    path.write_text(path.read_text() + "\n\nUNUSED = 1\n")
    found = untouched.run()
    below = ("tokenize", "lengths", "isolation", "train", "merge", "evaluate", "report")
    assert found == {"format": "ran"} | dict.fromkeys(below, "restored")


def test_max_seq_length_fixed_to_what_auto_had_chosen(project):
    project.run()  # settles what the tests before have edited and put back
    lengths = next((project.folder / "results" / "stages" / "lengths").glob("*/lengths.json"))
    chosen = json.loads(lengths.read_text())["max_seq_length"]["value"]
    found = project.run(config={"lengths": {"max_seq_length": chosen}})
    assert found == {
        "lengths": "ran",
        "isolation": "restored",
        "train": "restored",
        "merge": "restored",
        "evaluate": "restored",
        "report": "ran",
    }


def test_a_setting_changed_and_changed_back(project):
    """A → B → A: B runs what depends on it; going back runs no stage, and the results are those of A again."""

    def figures() -> dict:
        # All but what a stage took, which differs where one was computed again in between.
        metrics = project.result("metrics.json")
        return {name: value for name, value in metrics.items() if name not in ("stages", "cost")}

    before = figures()
    other = {"train": {"learning_rate": 5e-4}}
    assert project.run(config=other) == {"train": "ran", "merge": "ran", "evaluate": "ran", "report": "ran"}
    assert figures()["train"] != before["train"]
    assert project.planned() == {}
    assert project.run() == {}
    assert figures() == before


def test_lost_results_are_put_back(project):
    shutil.rmtree(project.folder / "results" / "default")
    assert project.run() == {}
    assert (project.folder / "results" / "default" / "merged_model" / "model.safetensors").exists()


def test_parsing_imports_no_torch(project):
    """`snakemake -n` stays quick: none of the heavy packages is imported to parse the workflow."""
    blocker = project.folder / "blocked"
    blocker.mkdir()
    for name in ("torch", "transformers", "datasets", "pyarrow"):
        (blocker / f"{name}.py").write_text(f"raise ImportError('{name} was imported to parse the workflow')\n")
    path = {"PYTHONPATH": os.pathsep.join([str(blocker), project.environment["PYTHONPATH"]])}
    done = project.python("-m", "snakemake", "-n", "merged_model", "--cores", "1", variables=path)
    assert done.returncode == 0, done.stdout


def test_prune_lists_and_removes_what_no_run_needs(project):
    project.run(config=OTHER)
    project.run()
    prune = ("-m", "adder.workflow.cli", "prune")
    text = project.python(*prune, input="n\n").stdout
    assert "results/stages/train/" in text and text.endswith("Nothing was removed.\n")
    assert "Removed." in project.python(*prune, input="y\n").stdout
    assert "Nothing to prune" in project.python(*prune).stdout
    assert project.planned() == {}
    assert (project.folder / "results" / "default" / "merged_model" / "model.safetensors").exists()
