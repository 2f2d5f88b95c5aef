"""What a configuration may ask for beside the model: tasks, a guard, a judge, a GGUF file, an upload. By real jobs."""

import json

from hub_server import serving
from judge_server import judging
from project import OTHER

TASK = """
task: urgent
dataset_path: json
dataset_kwargs: {data_files: {test: urgent.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{message}} Is this urgent?"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_task(folder) -> None:
    folder.mkdir()
    (folder / "urgent.yaml").write_text(TASK)
    rows = [{"message": f"My lamp number {n} broke.", "answer": ("yes", "no")[n % 2]} for n in range(12)]
    (folder / "urgent.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_task_guard_gguf_and_upload(project, tmp_path):
    write_task(project.folder / "tasks")
    config = {
        "evaluate": {"tasks": [{"path": "tasks/urgent.yaml", "max_drop": 1.0}]},
        "export": {"gguf": "f16", "hub": "me/mine"},
    }
    project.run()  # whatever other tests left
    assert project.run(config=config) == {"task": "ran", "report": "ran", "gguf": "ran"}
    folder = project.folder / "results" / "default"
    (task,) = project.result("metrics.json")["tasks"]
    assert (task["task"], task["guard"], task["max_drop"]) == ("urgent", "passed", 1.0)
    assert project.result("guard.json")["passed"] and (folder / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert (
        "urgent" in (folder / "report.html").read_text() and "urgent" in (folder / "merged_model/README.md").read_text()
    )

    with serving({}, owner="me", room=tmp_path / "hub") as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        project.configure(config)
        done = project.python("-m", "snakemake", "push", "--cores", "1", variables=variables)
    assert done.returncode == 0, done.stdout
    assert project.result("pushed.json")["repo"] == "me/mine" and "hf_right" not in done.stdout
    names = {path.name for path in (tmp_path / "hub").rglob("*")}
    assert {"README.md", "config.json", "model.safetensors"} <= names

    # A score that fell further than it may fails the run; model and report stay.
    metrics = folder / "metrics.json"
    fallen = task | {"difference": {"value": -1.5, "ci95": [-1.6, -1.4], "p": 0.001}}
    metrics.write_text(json.dumps(project.result("metrics.json") | {"tasks": [fallen]}))
    project.configure(config)
    done = project.python("-m", "snakemake", "results/default/guard.json", "--cores", "1", "--forcerun", "check_guard")
    assert done.returncode == 1 and "guard" in done.stdout and "urgent" in done.stdout
    assert (folder / "report.html").exists() and not (folder / "guard.json").exists()

    # What is no longer asked for goes.
    (folder / "pushed.json").unlink()
    assert project.run() == {}
    assert not (folder / "model.gguf").exists() and project.result("metrics.json")["tasks"] == []


def test_a_judge(project):
    # Its replies are others than the base's: the same reply twice is a tie, and nobody is asked.
    with judging() as judge:
        asked = {"base_url": judge.url, "model": "judge", "api_key_env": None, "max_samples": 4}
        project.run(config=OTHER | {"evaluate": {"judge": asked}})
    found = project.result("metrics.json")["judge"]
    assert found["pairs"] == 4 and found["wins"] + found["losses"] + found["ties"] == 4
    assert judge.asked and len(judge.asked) % 2 == 0  # in both orders
    assert project.run() == {}


def test_an_upload_that_nobody_set_up_is_refused(project):
    project.configure()
    done = project.python("-m", "snakemake", "push", "--cores", "1")
    assert done.returncode == 1 and "set export.hub to owner/name" in done.stdout
