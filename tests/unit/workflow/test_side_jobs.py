"""The jobs beside the stages: what they leave for people, and that a mistake ends them with a sentence."""

import re
import shutil
from pathlib import Path

import pytest

from adder.core import file_digests
from adder.core.file_digests import FileDigests
from adder.core.files import read_json, write_json
from adder.core.stage_record import StageMeaning
from adder.workflow import run_folder, side_jobs, stage_runner
from compare_fixture import write_run


def stage_folders(root: Path, method: str = "lora") -> dict[str, Path]:
    """Folders as the stages leave them, of a few bytes."""
    folders = {name: root / "stages" / name for name in ("report", "merge", "train", "gguf")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for page in (*run_folder.PAGES, "model_card.md"):
        (folders["report"] / page).write_text(page)
    for folder in (folders["merge"] / "model", *([folders["train"] / "adapter"] if method == "lora" else [])):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
    (folders["gguf"] / "model.gguf").write_text("weights")
    digests = FileDigests.of_results(root)
    for name, folder in folders.items():
        meaning: StageMeaning = {
            "stage": name,
            "key": name,
            "settings": {},
            "identity": {},
            "asked_versions": {},
            "inputs": {},
            "code": "",
        }
        stage_runner.finish(folder, meaning, {}, 1.0, digests)
    return folders


@pytest.mark.parametrize("clones", [False, True])
def test_a_runs_weights_are_links_or_clones_and_its_small_files_copies(tmp_path, monkeypatch, clones):
    # A copy, for file systems that have no reflinks.
    monkeypatch.setattr(file_digests, "clone", lambda source, to: clones and bool(shutil.copy2(source, to)))
    stages, target = stage_folders(tmp_path), tmp_path / "default"
    target.mkdir()
    side_jobs.link_run(stages, target, tmp_path / "log")
    assert run_folder.verify(target) == []
    model = target / "merged_model"
    assert (model / "model.safetensors").stat().st_mode & 0o222 == 0  # a link shares its bytes with stage and cache
    assert (model / "model.safetensors").samefile(stages["merge"] / "model" / "model.safetensors") != clones
    assert (target / "model.gguf").samefile(stages["gguf"] / "model.gguf") != clones
    assert not (model / "config.json").samefile(stages["merge"] / "model" / "config.json")
    assert (model / "README.md").read_text() == "model_card.md"
    for page in run_folder.PAGES:
        (target / page).write_text("edited by somebody")
        assert (stages["report"] / page).read_text() == page
    assert "merge: " in (tmp_path / "log").read_text()
    assert read_json(target / "stages.json") == {name: folder.name for name, folder in stages.items()}


def test_weights_are_not_read_again_to_be_published(tmp_path, monkeypatch):
    def only_small(path: Path) -> str:
        assert path.suffix not in stage_runner.WEIGHTS, f"{path} was read again"
        return "digest"

    stages, target = stage_folders(tmp_path), tmp_path / "default"
    target.mkdir()
    monkeypatch.setattr(file_digests, "digest_file", only_small)
    side_jobs.link_run(stages, target, tmp_path / "log")
    recorded = read_json(target / "files.json")
    outputs = read_json(stages["merge"] / "stage.json")["outputs"]
    assert recorded["merged_model/model.safetensors"] == outputs["model/model.safetensors"]["digest"]


def test_damaged_weights_are_not_published(tmp_path, capfd):
    stages, target = stage_folders(tmp_path), tmp_path / "default"
    target.mkdir()
    weights = stages["merge"] / "model" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_text("wEights")
    with pytest.raises(SystemExit):
        side_jobs.link_run(stages, target, tmp_path / "log")
    assert f"{weights}: not as the stage wrote it" in (tmp_path / "log").read_text()
    assert list(target.iterdir()) == []


def test_what_a_run_no_longer_has_does_not_stay(tmp_path):
    target = tmp_path / "default"
    target.mkdir()
    side_jobs.link_run(stage_folders(tmp_path / "a"), target, tmp_path / "log")
    stages = stage_folders(tmp_path / "b", method="full")
    del stages["gguf"]
    side_jobs.link_run(stages, target, tmp_path / "log")
    assert not (target / "adapter").exists() and not (target / "model.gguf").exists()


@pytest.mark.parametrize(("drop", "passes"), [(0.01, True), (0.05, False)])
def test_the_guard_ends_the_job_of_a_run_that_forgot_too_much(tmp_path, capsys, drop, passes):
    task = {"task": "arc", "metric": "acc", "max_drop": 0.03, "higher_is_better": True, "base": {"value": 0.5}}
    difference = {"value": -drop, "ci95": [-0.09, 0.02]}
    write_json(
        tmp_path / "metrics.json", {"tasks": [{**task, "tuned": {"value": 0.5 - drop}, "difference": difference}]}
    )
    arguments = (tmp_path / "metrics.json", tmp_path / "guard.json", tmp_path / "log")
    if passes:
        side_jobs.check_guard(*arguments)
        assert read_json(tmp_path / "guard.json")["passed"]
    else:
        with pytest.raises(SystemExit):
            side_jobs.check_guard(*arguments)
        said = capsys.readouterr().err
        assert re.match(r"guard: arc: acc got worse by 0\.05.*report\.html are there all the same", said)
        assert not (tmp_path / "guard.json").exists()
    assert (tmp_path / "log").read_text().startswith("arc: acc")


def test_the_comparison_leaves_its_sentence_in_the_log_and_a_mistake_too(tmp_path, capfd):
    runs = {name: write_run(tmp_path, name, right=right, heldout=20) for name, right in (("a", 0.9), ("b", 0.2))}
    write_json(tmp_path / "request.json", {"wanted": {"a": "1", "b": "2"}})
    side_jobs.compare_runs(runs, tmp_path, tmp_path / "request.json", tmp_path / "log")
    assert read_json(tmp_path / "cache" / "compared.json") == {"a": "1", "b": "2"}
    assert (tmp_path / "log").read_text().startswith("Use a: ") and (tmp_path / "compare.csv").exists()
    (runs["b"]["train"] / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        side_jobs.compare_runs(runs, tmp_path, tmp_path / "request.json", tmp_path / "log")
    assert ended.value.code == 1 and "metrics.jsonl is missing" in (tmp_path / "log").read_text()
    assert "compare: cannot go on: compare: " in capfd.readouterr().err


def test_an_upload_without_a_token_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    write_json(tmp_path / "metrics.json", {"verdict": {"sentence": "Better."}})
    (tmp_path / "merged_model").mkdir()
    with pytest.raises(SystemExit):
        side_jobs.push_run(
            tmp_path / "merged_model", "me/mine", True, "default", tmp_path / "pushed.json", tmp_path / "log"
        )
    assert "set HF_TOKEN" in (tmp_path / "log").read_text() and not (tmp_path / "pushed.json").exists()
