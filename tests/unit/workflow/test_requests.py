"""What isn't what the configuration stands for is asked for anew, and nothing else."""

import os
import shutil
import time
from pathlib import Path

import pytest

import damaged_files
from adder.core import file_digests
from adder.core.file_digests import FileDigests
from adder.core.files import digest_file
from adder.core.section import Section
from adder.core.stage_record import StageMeaning
from adder.workflow import requests, run_folder, stage_runner
from adder.workflow.code_digest import code_digest
from adder.workflow.stage_graph import Stage
from adder.workflow.stages import SPECS
from damaged_files import DAMAGES


class NoSettings(Section):
    """Settings of the tests' stages."""


@pytest.fixture
def stages(tmp_path) -> dict[str, Stage]:
    """The stages data and format, finished."""
    data = Stage(SPECS["data"], NoSettings(), {"a": 1})
    found = {"data": data, "format": Stage(SPECS["format"], NoSettings(), {"b": 1}, {"data": data})}
    for stage in found.values():
        finish(tmp_path, stage)
    return found


def finish(results: Path, stage: Stage, text: str = "row\n", summary: dict[str, object] | None = None) -> None:
    folder = results / stage.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").unlink(missing_ok=True)
    for name in ("rows.jsonl", "reading.json"):
        (folder / name).write_text(text)
    records = {name: stage_runner.read_record(results / parent.folder) for name, parent in stage.parents.items()}
    meaning: StageMeaning = {
        "stage": stage.name,
        "key": stage.key,
        "settings": {},
        "identity": stage.identity,
        "asked_versions": {},
        "inputs": {
            name: stage_runner.input_digests(record, stage.spec.reads[name])
            for name, record in records.items()
            if record
        },
        "code": code_digest(stage.spec.run),
    }
    stage_runner.finish(folder, meaning, summary or {}, 1.0, FileDigests.of_results(results))


def asked(results: Path, stages: dict[str, Stage]) -> tuple[set[str], list[str]]:
    """Names of the stages that are asked for anew, and what is said."""
    said = requests.ask_for_stages(results, stages.values(), FileDigests.of_results(results))
    newer = {
        name
        for name, stage in stages.items()
        if (record := results / stage.folder / "stage.json").exists()
        and requests.request_file(results, requests.stage_request(stage)).stat().st_mtime_ns > record.stat().st_mtime_ns
    }
    return newer, said


def test_what_is_as_it_was_made_is_not_asked_for(tmp_path, stages):
    assert asked(tmp_path, stages) == (set(), [])
    shutil.rmtree(tmp_path / stages["data"].folder)  # Snakemake makes it in any case
    assert asked(tmp_path, stages) == (set(), [])


@pytest.mark.parametrize("damage", [*DAMAGES, "record", "record cut"])
def test_a_damaged_stage_is_asked_for_and_named(tmp_path, stages, damage):
    folder = tmp_path / stages["data"].folder
    file, record = folder / "rows.jsonl", folder / "stage.json"
    if damage in DAMAGES:
        damaged_files.damage(file, damage)
    if damage == "record":
        record.write_text(record.read_text().replace('"seconds": 1.0', '"seconds": 7.0'))
    if damage == "record cut":
        record.write_text(record.read_text()[:100])
    named = f"{record}: is damaged" if "record" in damage else f"{file}: not as the stage wrote it"
    assert asked(tmp_path, stages) == ({"data"}, [f"{named}; the stage data is made anew"])
    shutil.rmtree(folder)
    finish(tmp_path, stages["data"])
    assert asked(tmp_path, stages) == (set(), [])


@pytest.mark.parametrize("change", ["written to in place", "replaced"])
@pytest.mark.parametrize("links", ["as many", "one more", "one fewer"])
def test_no_link_hides_a_change_whose_time_stamp_was_put_back(tmp_path, stages, change, links):
    """Such as a kept copy that was lost, or somebody's own link."""
    folder = tmp_path / stages["data"].folder
    file, kept = folder / "rows.jsonl", tmp_path / "cache" / "data" / "kept"
    digests = FileDigests.of_results(tmp_path)
    stage_runner.link_tree(folder, kept, digests)
    assert asked(tmp_path, stages) == (set(), [])
    if links == "one more":
        os.link(file, tmp_path / "linked")
    if links == "one fewer":
        shutil.rmtree(kept)
    if change == "replaced":
        shutil.copy2(file, tmp_path / "copy")
        os.replace(tmp_path / "copy", file)
    damaged_files.damage(file, "time stamp put back")
    assert asked(tmp_path, stages)[0] == {"data"}


def test_a_file_that_a_stage_did_not_write_is_named_but_not_what_systems_leave(tmp_path, stages):
    """A model's folder with an adapter_config.json more is another model."""
    folder = tmp_path / stages["data"].folder
    (folder / ".DS_Store").write_text("")
    assert asked(tmp_path, stages) == (set(), [])
    (folder / "inner").mkdir()
    (folder / "inner" / "added.json").write_text("{}")
    named = f"{folder}/inner/added.json: not as the stage wrote it; the stage data is made anew"
    assert asked(tmp_path, stages) == ({"data"}, [named])


def test_what_a_stage_read_beside_its_settings_counts_where_it_changed(tmp_path, stages, monkeypatch):
    """Such as the files that a converter opens itself."""
    for name in ("labels.csv", "added.csv"):
        (tmp_path / name).write_text("a,1")
    recorded = {
        str(tmp_path / "labels.csv"): digest_file(tmp_path / "labels.csv"),
        str(tmp_path / "more.csv"): "absent",
    }
    finish(tmp_path, stages["data"], summary={"also_read": recorded})
    assert asked(tmp_path, stages) == (set(), [])
    (tmp_path / "labels.csv").write_text("a,2")
    (tmp_path / "added.csv").rename(tmp_path / "more.csv")
    others = [
        f"{tmp_path / name}: changed since it was read; the stage data is made anew"
        for name in ("labels.csv", "more.csv")
    ]
    assert asked(tmp_path, stages) == ({"data"}, others)


def test_what_was_moved_is_read_once_and_not_asked_for(tmp_path, stages, monkeypatch):
    """As copied from another disk, where every file is another for the file system."""
    for stage in stages.values():
        shutil.copytree(tmp_path / stage.folder, tmp_path / "copy", copy_function=shutil.copy2)
        shutil.rmtree(tmp_path / stage.folder)
        (tmp_path / "copy").rename(tmp_path / stage.folder)
    monkeypatch.setattr(file_digests, "UNSETTLED", 0)
    assert asked(tmp_path, stages) == (set(), [])
    monkeypatch.setattr(file_digests, "digest_file", damaged_files.never)
    assert asked(tmp_path, stages) == (set(), [])


def test_a_stage_of_other_code_or_other_inputs_is_asked_for_whatever_the_time_stamps(tmp_path, stages, monkeypatch):
    """As another clone of the project leaves them, or one whose clock was put back."""
    finish(tmp_path, stages["data"], "another row\n")
    for stage in stages.values():
        os.utime(tmp_path / stage.folder / "stage.json", (5, 5))
    assert asked(tmp_path, stages) == ({"format"}, [])
    finish(tmp_path, stages["format"])
    monkeypatch.setattr(
        requests, "code_digest", lambda module: "other" if "fetch_rows" in module else code_digest(module)
    )
    assert asked(tmp_path, stages) == ({"data"}, [])


def test_a_clock_that_was_put_back_hides_nothing(tmp_path, stages):
    """Records from a future are older than the request all the same; once that is made, the request is old again."""
    record = tmp_path / stages["data"].folder / "stage.json"
    (record.parent / "rows.jsonl").write_text("x")
    os.utime(record, (time.time() + 9e5,) * 2)
    assert asked(tmp_path, stages)[0] == {"data"}
    finish(tmp_path, stages["data"])
    finish(tmp_path, stages["format"])
    assert asked(tmp_path, stages) == (set(), [])


def test_a_request_has_another_content_each_time(tmp_path):
    """Snakemake takes a newer file with the content that it remembers for the one that it knows."""
    file, made = tmp_path / "request.json", tmp_path / "made"
    made.touch()
    seen = set()
    for _ in range(3):
        requests.ask(file, {"a": "k"}, made)
        seen.add(file.read_bytes())
        assert requests.wanted_by(file) == {"a": "k"}
        time.sleep(0.01)
    assert len(seen) == 3
    requests.ask(file, {"a": "k"}, None)
    assert file.stat().st_mtime == 0 and file.stat().st_mtime < made.stat().st_mtime


def test_a_runs_folder_of_other_stages_or_other_weights_is_asked_for(tmp_path):
    merge = Stage(SPECS["merge"], NoSettings(), {"a": 1})
    folder, target = tmp_path / merge.folder, tmp_path / "default"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_text("weights")
    finish(tmp_path, merge)
    (target / "merged_model").mkdir(parents=True)
    (target / "metrics.json").write_text("{}")
    digests = FileDigests.of_results(tmp_path)
    digests.clone_or_link(folder / "model" / "model.safetensors", target / "merged_model" / "model.safetensors")
    run_folder.write_record(target, {"merge": folder}, digests)

    def is_asked(stage: Stage) -> bool:
        requests.ask_for_run(tmp_path, "default", {"merge": stage}, FileDigests.of_results(tmp_path))
        return requests.request_file(tmp_path, "default").stat().st_mtime > (target / "metrics.json").stat().st_mtime

    assert not is_asked(merge)
    assert is_asked(Stage(SPECS["merge"], NoSettings(), {"a": 2}))
    assert not is_asked(merge)
    shutil.copy2(folder / "model" / "model.safetensors", target / "copy")
    os.replace(target / "copy", target / "merged_model" / "model.safetensors")
    assert not is_asked(merge)
    (target / "merged_model" / "model.safetensors").chmod(0o644)
    (target / "merged_model" / "model.safetensors").write_text("wEights")
    assert is_asked(merge)


def test_the_comparison_is_asked_for_where_it_is_of_other_reports(tmp_path):
    made = tmp_path / run_folder.COMPARED
    made.parent.mkdir()
    made.write_text('{"a": "1"}')
    file = requests.request_file(tmp_path, ".compare")
    requests.ask_for_comparison(tmp_path, {"a": "1"})
    assert file.stat().st_mtime == 0
    requests.ask_for_comparison(tmp_path, {"a": "2"})
    assert file.stat().st_mtime > made.stat().st_mtime and requests.wanted_by(file) == {"a": "2"}
