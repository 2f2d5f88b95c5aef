"""A stage's folder is whole or absent, and equal work is done once."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from adder import prune, stage
from adder.errors import UserError
from adder.files import write_json
from adder.plan import Stage


@pytest.fixture
def module(monkeypatch):
    """A stage module of our own that counts its runs; `reads` of the stage `format` apply to it."""
    fake = types.ModuleType("adder.fake")
    fake.runs, fake.error = 0, None

    def run(settings, inputs, out, progress):
        fake.runs += 1
        text = (inputs["data"] / "rows.jsonl").read_text() if "data" in inputs else ""
        (out / "inner").mkdir()
        (out / "inner" / "result.txt").write_text(f"{settings['a']} {text}")
        if fake.error:
            raise fake.error
        return {"lines": text.count("\n")}

    fake.run = run
    monkeypatch.setitem(sys.modules, "adder.fake", fake)
    monkeypatch.setattr(stage, "code_digest", lambda name: fake.code)
    fake.code = "code 1"
    return fake


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "results" / "stages" / "data" / "d"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("row\n")
    (folder / "other.json").write_text("1")
    stage.finish(folder, {"key": "d"})
    return folder


def execute(tmp_path, data, key="k", settings=None, **options):
    results = tmp_path / "results"
    stage.execute(
        "format", "fake", settings or {"a": 1}, {"data": data}, results, key, tmp_path / "logs" / "x.log", **options
    )
    return results / "stages" / "format" / key


def test_a_finished_stage_says_what_it_did(module, tmp_path, data):
    folder = execute(tmp_path, data)
    assert (folder / "inner" / "result.txt").read_text() == "1 row\n"
    record = json.loads((folder / "stage.json").read_text())
    assert record["summary"] == {"lines": 1}
    assert list(record["outputs"]) == ["inner/result.txt"] and list(record["inputs"]["data"]) == ["rows.jsonl"]
    assert record["seconds"] >= 0 and record["peak_memory_bytes"] > 1e6 and record["versions"]["python"]
    assert record["restored"] is False


def test_equal_work_is_restored_under_any_key(module, tmp_path, data, capfd):
    first = execute(tmp_path, data)
    second = execute(tmp_path, data, key="other")
    assert module.runs == 1
    assert os.path.samefile(first / "inner" / "result.txt", second / "inner" / "result.txt")
    record = json.loads((second / "stage.json").read_text())
    assert (record["key"], record["restored"]) == ("other", True)
    assert "restored from an equal earlier result in 0." in capfd.readouterr().err


def test_snakemake_removing_the_record_costs_nothing(module, tmp_path, data):
    folder = execute(tmp_path, data)
    (folder / "stage.json").unlink()
    execute(tmp_path, data)
    assert module.runs == 1 and (folder / "stage.json").exists()


@pytest.mark.parametrize("change", ["settings", "code", "input", "identity"])
def test_other_work_is_done_anew(module, tmp_path, data, change):
    execute(tmp_path, data, identity={"file": "digest 1"})
    settings, identity = {"a": 1}, {"file": "digest 1"}
    if change == "settings":
        settings, identity = {"a": 2}, None
    if change == "identity":
        identity = {"file": "digest 2"}
    if change == "code":
        module.code = "code 2"
    if change == "input":
        (data / "rows.jsonl").write_text("another row\n")  # changed after its stage had finished
    execute(tmp_path, data, settings=settings, identity=identity)
    assert module.runs == 2


def test_a_file_that_is_not_read_does_not_matter(module, tmp_path, data):
    execute(tmp_path, data)
    (data / "other.json").write_text("2")
    execute(tmp_path, data)
    assert module.runs == 1


def test_a_kept_result_that_was_written_to_is_not_restored(module, tmp_path, data):
    folder = execute(tmp_path, data)
    (folder / "inner" / "result.txt").write_text("edited by hand")
    execute(tmp_path, data)
    assert module.runs == 2 and (folder / "inner" / "result.txt").read_text() == "1 row\n"


def test_restoring_can_be_switched_off(module, tmp_path, data):
    execute(tmp_path, data)
    execute(tmp_path, data, runtime={"restore": False})
    assert module.runs == 2


@pytest.mark.parametrize(
    "error", [UserError("rows.jsonl, row 3: found a cat"), ValueError("boom"), KeyboardInterrupt()]
)
def test_a_failed_stage_leaves_nothing(module, tmp_path, data, error, capfd):
    module.error = error
    with pytest.raises(SystemExit):
        execute(tmp_path, data)
    assert not (tmp_path / "results" / "stages" / "format" / "k").exists()
    assert not list((tmp_path / "results" / "stages" / "format").iterdir())
    shown = capfd.readouterr().err
    if isinstance(error, UserError):
        assert shown == "format: cannot go on: rows.jsonl, row 3: found a cat\n"
    if isinstance(error, KeyboardInterrupt):
        assert shown == "format: interrupted; the same command goes on with this stage\n"
    if isinstance(error, ValueError):
        assert "format: failed: ValueError: boom" in shown and str(tmp_path / "logs" / "x.log") in shown
        assert "Traceback" in (tmp_path / "logs" / "x.log").read_text()


def test_output_goes_to_the_log_and_progress_to_the_terminal(module, tmp_path, data, capfd):
    run = module.run

    def noisy(settings, inputs, out, progress):
        os.write(1, b"a library's chatter\n")
        os.system("echo chatter of a child")
        progress.say("half way")
        return run(settings, inputs, out, progress)

    module.run = noisy
    execute(tmp_path, data)
    shown = capfd.readouterr()
    assert "chatter" not in shown.out + shown.err and "format: half way" in shown.err
    log = (tmp_path / "logs" / "x.log").read_text()
    assert "a library's chatter" in log and "chatter of a child" in log


def test_a_judge_that_fails_finds_its_judgements_again(module, tmp_path, capfd):
    seen = []

    def run(settings, inputs, out, progress, checkpoints):
        seen.append(sorted(path.name for path in checkpoints.glob("*")))
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / f"{len(seen)}.json").write_text("{}")
        if module.error:
            raise module.error

    module.run, module.error = run, UserError("no credit")
    arguments = ("judge", "fake", {"a": 1}, {}, tmp_path / "results", "k", tmp_path / "logs" / "x.log")
    needed = Stage("judge", {"a": 1})
    with pytest.raises(SystemExit):
        stage.execute(*arguments)
    assert prune.unneeded(tmp_path / "results", {needed.folder: needed}) == []
    module.error = None
    stage.execute(*arguments)
    assert seen == [[], ["1.json"]] and not list((tmp_path / "results" / "checkpoints").iterdir())


def test_prune_keeps_what_is_needed(module, tmp_path, data):
    needed = Stage("format", {"a": 1})
    folder = execute(tmp_path, data, key=needed.key)
    old = execute(tmp_path, data, key="0" * 12, settings={"a": 2})
    results = tmp_path / "results"
    (results / "checkpoints" / "f" / "checkpoint-1").mkdir(parents=True)
    write_json(results / "checkpoints" / "f" / "checkpoint-1" / "x.json", 1)
    found = prune.unneeded(results, {needed.folder: needed})
    fingerprint = json.loads((old / "stage.json").read_text())["fingerprint"]
    assert found == sorted([old, results / "cache" / "format" / fingerprint, data, results / "checkpoints" / "f"])
    assert prune.freed_bytes([old]) == 0  # every file of it has a link in the cache
    assert prune.freed_bytes(found) > (old / "inner" / "result.txt").stat().st_size
    prune.remove(found)
    assert folder.exists() and not old.exists() and not data.exists()
