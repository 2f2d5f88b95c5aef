"""A stage's folder is whole or absent, and equal work is done once."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import damaged_files
from adder.core.errors import UserError
from adder.core.file_digests import FileDigests
from adder.core.files import digest_file, read_json, write_json
from adder.core.section import Section
from adder.core.stage_spec import Context
from adder.workflow import prune, stage_runner
from adder.workflow.stage_graph import Stage
from adder.workflow.stages import SPECS
from damaged_files import DAMAGES


class ToySettings(Section):
    """Settings of the tests' stages."""

    a: int


@pytest.fixture
def module(monkeypatch):
    """A stage's module that counts its runs, as that of the stages `format` and, continued where killed, `judge`."""
    fake = types.ModuleType("adder.fake")
    fake.runs, fake.error = 0, None

    def run(settings: ToySettings, inputs: dict[str, Path], out: Path, context: Context) -> dict[str, int]:
        fake.runs += 1
        fake.earlier = context.earlier
        text = (inputs["data"] / "rows.jsonl").read_text() if "data" in inputs else ""
        (out / "inner").mkdir()
        (out / "inner" / "result.txt").write_text(f"{settings.a} {text}")
        if fake.error:
            raise fake.error
        return {"lines": text.count("\n")}

    fake.run = run
    monkeypatch.setitem(sys.modules, "adder.fake", fake)
    monkeypatch.setattr(stage_runner, "code_digest", lambda name: fake.code)
    for name in ("format", "judge", "train"):
        spec = dataclasses.replace(stage_runner.SPECS[name], run="adder.fake", settings=ToySettings, identity=None)
        monkeypatch.setitem(stage_runner.SPECS, name, spec)
    fake.code = "code 1"
    return fake


def needed_stage(name: str, a: int) -> Stage:
    return Stage(stage_runner.SPECS[name], ToySettings(a=a), {"a": a})


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "results" / "stages" / "data" / "d"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("row\n")
    (folder / "other.json").write_text("1")
    meaning = {
        "stage": "data",
        "key": "d",
        "settings": {},
        "identity": {},
        "asked_versions": {},
        "inputs": {},
        "code": "c",
    }
    stage_runner.finish(folder, meaning, {}, 1.0, FileDigests.of_results(tmp_path / "results"))
    return folder


def execute(tmp_path, inputs, name="format", key="k", settings=None, identity=None, **options):
    settings = settings or {"a": 1}
    stage_runner.execute(
        name,
        {"settings": settings, "identity": identity or settings},
        inputs=inputs,
        results=tmp_path / "results",
        key=key,
        log=tmp_path / "logs" / "x.log",
        **options,
    )
    return tmp_path / "results" / "stages" / name / key


def test_a_finished_stage_says_what_it_did(module, tmp_path, data):
    folder = execute(tmp_path, {"data": data})
    assert (folder / "inner" / "result.txt").read_text() == "1 row\n"
    record = json.loads((folder / "stage.json").read_text())
    assert record["summary"] == {"lines": 1}
    assert list(record["outputs"]) == ["inner/result.txt"] and list(record["inputs"]["data"]) == ["rows.jsonl"]
    assert record["seconds"] >= 0 and record["peak_memory_bytes"] > 1e6 and record["versions"]["python"]
    assert record["restored"] is False


def test_a_stage_records_the_energy_that_the_machine_tells(module, tmp_path, data, monkeypatch):
    zone, run = tmp_path / "powercap" / "intel-rapl:0", module.run
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "9000000000"), ("energy_uj", "1000000")):
        (zone / name).write_text(text)
    monkeypatch.setattr(stage_runner.energy, "RAPL", zone.parent)

    @functools.wraps(run)
    def using(*arguments):
        (zone / "energy_uj").write_text("31500000")
        return run(*arguments)

    module.run = using
    record = read_json(execute(tmp_path, {"data": data}) / "stage.json")
    assert record["energy_joules"] == 30.5 and record["energy_parts"] == {"cpu": 30.5}


def test_equal_work_is_restored_under_any_key(module, tmp_path, data, capfd):
    first = execute(tmp_path, {"data": data})
    second = execute(tmp_path, {"data": data}, key="other")
    assert module.runs == 1
    assert os.path.samefile(first / "inner" / "result.txt", second / "inner" / "result.txt")
    record = json.loads((second / "stage.json").read_text())
    assert (record["key"], record["restored"]) == ("other", True)
    assert "restored from an equal earlier result in 0." in capfd.readouterr().err


def test_snakemake_removing_the_record_costs_nothing(module, tmp_path, data):
    folder = execute(tmp_path, {"data": data})
    (folder / "stage.json").unlink()
    execute(tmp_path, {"data": data})
    assert module.runs == 1 and (folder / "stage.json").exists()


@pytest.mark.parametrize("change", ["settings", "code", "identity"])
def test_other_work_is_done_anew(module, tmp_path, data, change):
    execute(tmp_path, {"data": data}, identity={"file": "digest 1"})
    settings, identity = {"a": 1}, {"file": "digest 1"}
    if change == "settings":
        settings, identity = {"a": 2}, None
    if change == "identity":
        identity = {"file": "digest 2"}
    if change == "code":
        module.code = "code 2"
    execute(tmp_path, {"data": data}, settings=settings, identity=identity)
    assert module.runs == 2


@pytest.mark.parametrize("damage", [*DAMAGES, "record"])
def test_what_is_not_as_its_stage_wrote_it_is_refused(module, tmp_path, data, capfd, damage):
    """Before anything is computed or restored from it: it would bear the other's name."""
    execute(tmp_path, {"data": data})
    file = data / "rows.jsonl"
    if damage in DAMAGES:
        damaged_files.damage(file, damage)
    if damage == "record":
        (data / "stage.json").write_text((data / "stage.json").read_text().replace('"data"', '"dada"'))
    with pytest.raises(SystemExit):
        execute(tmp_path, {"data": data})
    named = data / "stage.json" if damage == "record" else file
    told = "is damaged" if damage == "record" else "not as the stage wrote it"
    shown = capfd.readouterr().err
    assert f"{named}: {told}; start the workflow again, which makes the stage anew" in shown and module.runs == 1


def test_a_copied_or_touched_result_is_the_same(module, tmp_path, data):
    """As after `cp -r` of all results: time stamps are others, the content isn't."""
    folder = execute(tmp_path, {"data": data})
    for path in [*tmp_path.glob("results/stages/*/*/**/*"), *tmp_path.glob("results/cache/format/*/**/*")]:
        if path.is_file():
            os.utime(path, ns=(1, 1))
    shutil.rmtree(folder)
    execute(tmp_path, {"data": data})
    assert module.runs == 1


def test_a_file_that_is_not_read_does_not_matter(module, tmp_path, data):
    execute(tmp_path, {"data": data})
    (data / "other.json").write_text("2")
    execute(tmp_path, {"data": data})
    assert module.runs == 1


def test_a_kept_result_that_was_written_to_is_not_restored(module, tmp_path, data):
    folder = execute(tmp_path, {"data": data})
    (folder / "inner" / "result.txt").write_text("edited by hand")
    execute(tmp_path, {"data": data})
    assert module.runs == 2 and (folder / "inner" / "result.txt").read_text() == "1 row\n"


def test_damage_with_the_time_stamp_put_back_does_not_hide_behind_a_lost_folder(module, tmp_path, data):
    """What is lost takes its links with it, and that changes the kept file's change time too."""
    folder = execute(tmp_path, {"data": data})
    file = folder / "inner" / "result.txt"
    stat = file.stat()
    file.chmod(0o644)
    file.write_text("7 row\n")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shutil.rmtree(folder)
    execute(tmp_path, {"data": data})
    assert module.runs == 2 and file.read_text() == "1 row\n"


def test_what_was_made_of_another_file_than_there_is_now_is_not_restored(module, tmp_path, data):
    """One that the settings don't name, which a converter opened itself."""
    other, run = tmp_path / "labels.csv", module.run
    other.write_text("1")

    def reading(settings, inputs: dict[str, Path], out, context):
        return {**run(settings, inputs, out, context), "also_read": {str(other): digest_file(other)}}

    module.run = reading
    for runs, text in [(1, "1"), (1, "1"), (2, "2"), (2, "2")]:
        other.write_text(text)
        execute(tmp_path, {"data": data})
        assert module.runs == runs


@pytest.mark.parametrize("how", ["written to", "made anew", "a file more"])
def test_a_parent_that_changes_while_it_is_read_is_noticed(module, tmp_path, data, capfd, how):
    run = module.run

    def exchanging(settings, inputs: dict[str, Path], out, context):
        found = run(settings, inputs, out, context)
        if how == "a file more":
            (data / "inner").mkdir()
            (data / "inner" / "x.json").write_text("1")
        else:
            (data / "rows.jsonl").write_text("two\nrows\n")
        if how == "made anew":
            record = read_json(data / "stage.json")
            stage_runner.finish(data, record, {}, 1.0, FileDigests.of_results(tmp_path / "results"))
        return found

    module.run = exchanging
    spec = dataclasses.replace(stage_runner.SPECS["format"], reads={"data": ("rows.jsonl", "inner/")})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setitem(stage_runner.SPECS, "format", spec)
        execute(tmp_path, {"data": data})
    said = "made anew while being read" if how == "made anew" else "not as the stage wrote it; start the workflow again"
    assert said in capfd.readouterr().err
    assert not (tmp_path / "results" / "stages" / "format" / "k").exists()


def test_restoring_can_be_switched_off(module, tmp_path, data):
    execute(tmp_path, {"data": data})
    execute(tmp_path, {"data": data}, runtime={"restore": False})
    assert module.runs == 2


def test_a_stage_is_told_its_earlier_results_newest_first_as_far_as_they_are_whole(module, tmp_path, data, monkeypatch):
    for a in range(1, 6):
        monkeypatch.setattr("time.strftime", lambda *args, a=a: f"2026-01-0{a}T00:00:00Z")
        execute(tmp_path, {"data": data}, key=str(a), settings={"a": a})
        made = [(folder / "inner" / "result.txt").read_text().split()[0] for folder in module.earlier.folders]
        assert made == [str(number) for number in range(a - 1, 0, -1)]
        assert module.earlier.code("adder.fake") == "code 1"
    kept = {(folder / "inner" / "result.txt").read_text()[0]: folder for folder in module.earlier.folders}
    (kept["2"] / "inner" / "result.txt").write_text("edited by hand")
    (kept["3"] / "inner" / "result.txt").unlink()
    kept["4"].rename(kept["4"].with_name(".being linked"))
    execute(tmp_path, {"data": data}, settings={"a": 6})
    assert {(folder / "inner" / "result.txt").read_text()[0] for folder in module.earlier.folders} == {"1", "5"}
    execute(tmp_path, {"data": data}, settings={"a": 7}, runtime={"restore": False})
    assert module.earlier.folders == ()


@pytest.mark.parametrize(
    "error", [UserError("rows.jsonl, row 3: found a cat"), ValueError("boom"), KeyboardInterrupt()]
)
def test_a_failed_stage_leaves_nothing(module, tmp_path, data, error, capfd):
    module.error = error
    with pytest.raises(SystemExit):
        execute(tmp_path, {"data": data})
    assert not (tmp_path / "results" / "stages" / "format" / "k").exists()
    assert not list((tmp_path / "results" / "stages" / "format").iterdir())
    shown = capfd.readouterr().err
    if isinstance(error, UserError):
        assert shown == "format: cannot go on: rows.jsonl, row 3: found a cat\n"
    if isinstance(error, KeyboardInterrupt):
        assert shown == "format: interrupted; the same command starts this stage anew\n"
    if isinstance(error, ValueError):
        assert "format: failed: ValueError: boom" in shown and str(tmp_path / "logs" / "x.log") in shown
        assert "Traceback" in (tmp_path / "logs" / "x.log").read_text()


def test_output_goes_to_the_log_and_progress_to_the_terminal(module, tmp_path, data, capfd):
    run = module.run

    def noisy(settings, inputs: dict[str, Path], out, context):
        os.write(1, b"a library's chatter\n")
        os.system("echo chatter of a child")
        context.progress.say("half way")
        return run(settings, inputs, out, context)

    module.run = noisy
    execute(tmp_path, {"data": data})
    shown = capfd.readouterr()
    assert "chatter" not in shown.out + shown.err and "format: half way" in shown.err
    log = (tmp_path / "logs" / "x.log").read_text()
    assert "a library's chatter" in log and "chatter of a child" in log


def test_a_judge_that_fails_finds_its_judgements_again(module, tmp_path, capfd):
    seen = []

    def run(settings, inputs: dict[str, Path], out, context):
        checkpoints = context.checkpoints
        seen.append(sorted(path.name for path in checkpoints.glob("*")))
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / f"{len(seen)}.json").write_text("{}")
        if module.error:
            raise module.error

    module.run, module.error = run, UserError("no credit")
    needed = needed_stage("judge", 1)
    with pytest.raises(SystemExit):
        execute(tmp_path, {}, "judge")
    assert prune.unneeded(tmp_path / "results", {needed.folder: needed}) == []
    module.error = None
    execute(tmp_path, {}, "judge")
    assert seen == [[], ["1.json"]] and not list((tmp_path / "results" / "checkpoints").iterdir())


@pytest.mark.parametrize(("name", "checkpoint"), [("train", "checkpoint-5/seal.json"), ("judge", "0a.json")])
def test_an_interrupted_stage_goes_on_only_from_a_checkpoint(module, tmp_path, capfd, name, checkpoint):
    def run(settings, inputs: dict[str, Path], out, context):
        checkpoints = context.checkpoints
        # What isn't a checkpoint: a plan, and a checkpoint that isn't whole.
        (checkpoints / "checkpoint-9").mkdir(parents=True, exist_ok=True)
        if name == "train":
            write_json(checkpoints / "plan.json", {})
        if settings.a == 2:
            (checkpoints / checkpoint).parent.mkdir(exist_ok=True)
            write_json(checkpoints / checkpoint, {})
        raise KeyboardInterrupt

    module.run = run
    for a, told in ((1, "starts this stage anew"), (2, "goes on from its last checkpoint")):
        with pytest.raises(SystemExit):
            execute(tmp_path, {}, name, settings={"a": a})
        assert capfd.readouterr().err == f"{name}: interrupted; the same command {told}\n"


ONE_OF_TWO = """
import sys, time, types
from pathlib import Path
import dataclasses
from adder.core.section import Section
from adder.workflow import stage_runner

class ToySettings(Section):
    a: int

def run(settings, inputs: dict, out, context):
    print("chatter", flush=True)
    context.progress.say("computing")
    while not Path("go on").exists():
        time.sleep(0.01)
    (out / "result.txt").write_text("1")

sys.modules["adder.fake"] = types.ModuleType("adder.fake")
sys.modules["adder.fake"].run = run
stage_runner.code_digest = lambda name: "code"
spec = dataclasses.replace(stage_runner.SPECS["format"], run="adder.fake", settings=ToySettings, identity=None)
stage_runner.SPECS["format"] = spec
where = {"inputs": {}, "results": Path("results"), "key": "k", "log": Path("x.log")}
runtime = {"restore": sys.argv[1] == "restore"}
stage_runner.execute("format", {"settings": {"a": 1}, "identity": {"a": 1}}, runtime, **where)
"""


@pytest.mark.parametrize("end", ["restore", "use", "killed"])
def test_a_process_that_outlived_its_snakemake_is_waited_for(tmp_path, end):
    """The second process computes nothing where the first one finishes, and everything where that is killed."""
    command = [sys.executable, "-c", ONE_OF_TWO, end]
    begin = functools.partial(subprocess.Popen, command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    first = begin()
    assert first.stderr.readline() == "format: computing\n"
    second = begin()
    try:
        who = rf"another process \(process {first.pid} on .+\)"
        told = second.stderr.readline()
        assert re.fullmatch(rf"format: {who} is still at work on this stage; waiting for it\n", told)
        if end == "killed":
            first.kill()
            assert second.stderr.readline() == "format: computing\n"
        (tmp_path / "go on").touch()
        rest = second.communicate(timeout=60)[1]
    finally:
        first.kill()
        second.kill()
        first.communicate()
    expected = {"restore": "restored from an equal", "use": "the other process has finished it\n", "killed": "done in"}
    assert rest.startswith(f"format: {expected[end]}") and rest.count("\n") == 1 and second.returncode == 0
    assert (tmp_path / "x.log").read_text() == "chatter\n" * (2 if end == "killed" else 1)
    assert (tmp_path / "results/stages/format/k/result.txt").read_text() == "1"
    assert [path.name for path in (tmp_path / "results/stages/format").iterdir()] == ["k"]


@pytest.mark.parametrize(
    ("owner", "step", "time", "is_lost"),
    [
        (stage_runner, "link_tree", 1, True),
        (stage_runner, "_replace", 1, True),
        (stage_runner, "_replace", 2, False),
        (FileDigests, "with_links", 1, True),
    ],
)
def test_a_kill_after_the_work_is_done_costs_nothing_once_it_is_kept(module, tmp_path, owner, step, time, is_lost):
    """That is the first thing that happens to it, and what the killed process left is gone in the end."""
    child = os.fork()
    if not child:
        run, real, calls = module.run, getattr(owner, step), []

        def killed(*arguments, **options):
            calls.append(1)
            return os._exit(9) if len(calls) == time else real(*arguments, **options)

        def last_step(settings: ToySettings, inputs: dict[str, Path], out: Path, context: Context):
            found = run(settings, inputs, out, context)
            setattr(owner, step, killed)
            return found

        module.run = last_step
        with contextlib.suppress(BaseException):
            execute(tmp_path, {})
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    folder = tmp_path / "results" / "stages" / "format" / "k"
    (folder / "stage.json").unlink(missing_ok=True)  # as Snakemake does
    execute(tmp_path, {})
    assert module.runs == is_lost and (folder / "inner" / "result.txt").read_text() == "1 "
    assert [path.name for path in folder.parent.iterdir()] == ["k"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        OSError("25908 requested and 6784 written"),  # numpy's tofile
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_sentence(module, tmp_path, data, capfd, error):
    module.error = error
    with pytest.raises(SystemExit):
        execute(tmp_path, {"data": data})
    shown = capfd.readouterr().err
    assert re.fullmatch(
        r"format: cannot go on: the disk of .+/results/ has no room left \([\d,.]+ MB free, .+\n", shown
    )


def test_secrets_reach_neither_log_nor_terminal(module, tmp_path, monkeypatch, capfd):
    """Whatever library writes them there, and whether their names tell of it or only the settings do."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret1")
    monkeypatch.setenv("MY_SIGNED", "a/b+secret2")

    class Settings(ToySettings):
        url: str

    def run(settings: Settings, inputs: dict[str, Path], out: Path, context: Context) -> dict[str, int]:
        os.write(2, b"GET https://h/x?a%2Fb%2Bsecret2\n")
        print(f"Authorization: Bearer {os.environ['HF_TOKEN']}", flush=True)
        raise ValueError("https://me:pass3word@h/x?token=secret4 hf_secret1 a/b+secret2")

    module.run = run
    spec = dataclasses.replace(stage_runner.SPECS["format"], settings=Settings)
    monkeypatch.setitem(stage_runner.SPECS, "format", spec)
    with pytest.raises(SystemExit):
        execute(tmp_path, {}, settings={"a": 1, "url": "https://h/x?${MY_SIGNED}"})
    shown, log = capfd.readouterr().err, (tmp_path / "logs" / "x.log").read_text()
    assert "ValueError" in shown and "Traceback" in log and "${HF_TOKEN}" in log and "${MY_SIGNED}" in log
    for secret in ("secret1", "secret2", "pass3word", "secret4"):
        assert secret not in shown + log


def test_weights_become_read_only_but_not_the_users_own_that_are_linked(module, tmp_path):
    own = tmp_path / "own.safetensors"
    own.write_text("weights")
    mode = own.stat().st_mode

    def run(settings: ToySettings, inputs: dict[str, Path], out: Path, context: Context) -> dict[str, int]:
        os.link(own, out / "linked.safetensors")
        (out / "made.safetensors").write_text("weights")
        return {}

    module.run = run
    folder = execute(tmp_path, {})
    assert own.stat().st_mode == mode == (folder / "linked.safetensors").stat().st_mode
    assert (folder / "made.safetensors").stat().st_mode & 0o222 == 0


def test_the_time_of_a_continued_stage_is_that_of_all_attempts(module, tmp_path, capfd):
    def run(settings, inputs: dict[str, Path], out, context):
        time.sleep(0.3)
        if module.error:
            raise module.error

    module.run = run
    for error in (UserError("told to stop"), KeyboardInterrupt(), None):
        module.error = error
        with contextlib.suppress(SystemExit):
            execute(tmp_path, {}, "judge")
    record = json.loads((tmp_path / "results" / "stages" / "judge" / "k" / "stage.json").read_text())
    assert record["attempts"] == 3 and 0.9 < record["seconds"] < 3
    assert f"done in {record['seconds']:.1f} s, in 3 attempts" in capfd.readouterr().err
    execute(tmp_path, {}, "judge", runtime={"restore": False})  # other work, which owes nothing to those
    record = json.loads((tmp_path / "results" / "stages" / "judge" / "k" / "stage.json").read_text())
    assert "attempts" not in record and record["seconds"] < 0.9


@pytest.fixture
def named_file(module, monkeypatch, tmp_path) -> Path:
    """A file that the settings of the stage `format` name, and the working directory that it is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("one")
    spec = dataclasses.replace(
        stage_runner.SPECS["format"],
        identity=lambda settings, where, digests: digests.of(tmp_path / "rows.jsonl"),
    )
    monkeypatch.setitem(stage_runner.SPECS, "format", spec)
    return tmp_path / "rows.jsonl"


def test_a_file_that_changed_since_the_workflow_was_parsed_is_not_read_under_the_old_key(
    module, tmp_path, named_file, capfd
):
    key_stands_for = FileDigests(tmp_path / "elsewhere.json", tmp_path).of(named_file)
    named_file.write_text("two")
    with pytest.raises(SystemExit):
        execute(tmp_path, {}, identity=key_stands_for)
    assert f"{named_file}: changed since the workflow began; start it again" in capfd.readouterr().err
    assert module.runs == 0 and not (tmp_path / "results" / "stages" / "format" / "k").exists()


@pytest.mark.parametrize("how", ["a file more", "a file fewer", "put back under a link of its own"])
def test_files_that_come_go_or_return_while_they_are_read_are_noticed(
    module, tmp_path, named_file, monkeypatch, capfd, how
):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)

    def identity(settings, where, digests):
        return digests.named(sorted(tmp_path.glob("*.jsonl")))

    spec = dataclasses.replace(stage_runner.SPECS["format"], identity=identity)
    monkeypatch.setitem(stage_runner.SPECS, "format", spec)
    run = module.run

    def exchanging(settings, inputs: dict[str, Path], out, context):
        if how == "a file more":
            (tmp_path / "c.jsonl").write_text("c")
        if how == "a file fewer":
            (tmp_path / "b.jsonl").unlink()
        if how == "put back under a link of its own":
            os.link(tmp_path / "a.jsonl", tmp_path / "kept")
            (tmp_path / "new").write_text("z")
            os.replace(tmp_path / "new", tmp_path / "a.jsonl")
            (tmp_path / "a.jsonl").read_text()
            (tmp_path / "a.jsonl").unlink()
            os.link(tmp_path / "kept", tmp_path / "a.jsonl")
        return run(settings, inputs, out, context)

    module.run = exchanging
    with pytest.raises(SystemExit):
        execute(tmp_path, {}, identity=identity(None, "", FileDigests(tmp_path / "elsewhere.json", tmp_path)))
    assert "changed while being read; start the workflow again" in capfd.readouterr().err
    assert not (tmp_path / "results" / "stages" / "format" / "k").exists()


# What settings may name: the stage and its settings, what is there, and which file somebody exchanges.
ROWS, TASK = {"rows.jsonl": "{}"}, {"tasks/own.yaml": "task: own\ndoc_to_text: !function helper.ask\n"}
NAMED = {
    "rows": ("data", {"sources": [{"path": "rows.jsonl"}]}, ROWS, "rows.jsonl"),
    "rows of a pattern": ("data", {"sources": [{"path": "*.jsonl"}]}, ROWS | {"b.jsonl": ""}, "b.jsonl"),
    "rows of a folder": ("data", {"sources": [{"path": "all/*.jsonl"}]}, {"all/rows.jsonl": "{}"}, "all/rows.jsonl"),
    "held-out rows": (
        "data",
        {"sources": [{"path": "rows.jsonl"}], "heldout_sources": [{"path": "other.jsonl"}]},
        ROWS | {"other.jsonl": "{}"},
        "other.jsonl",
    ),
    "test rows": (
        "data",
        {"sources": [{"path": "rows.jsonl"}], "tests": [{"path": "test.jsonl"}]},
        ROWS | {"test.jsonl": "{}"},
        "test.jsonl",
    ),
    "a converter": (
        "data",
        {"sources": [{"path": "rows.jsonl", "convert": "mine.py"}]},
        ROWS | {"mine.py": "rows = 1"},
        "mine.py",
    ),
    "what a converter imports": (
        "data",
        {"sources": [{"path": "rows.jsonl", "convert": "mine.py"}]},
        ROWS | {"mine.py": "import helper", "helper.py": ""},
        "helper.py",
    ),
    "a model": ("model", {"source": "./base"}, {"base/config.json": "{}"}, "base/config.json"),
    "a GGUF file": ("model", {"source": "base.gguf"}, {"base.gguf": "GGUF"}, "base.gguf"),
    "an adapter": (
        "model",
        {"source": "./base", "adapter": "./lora"},
        {"base/config.json": "{}", "lora/adapter_config.json": "{}", "lora/adapter_model.safetensors": "1"},
        "lora/adapter_model.safetensors",
    ),
    "a chat template": ("tokenize", {"chat_template": "./own.jinja"}, {"own.jinja": "{{ messages }}"}, "own.jinja"),
    "a task": ("task", {"path": "tasks/own.yaml"}, TASK | {"tasks/helper.py": ""}, "tasks/own.yaml"),
    "a task's code": ("task", {"path": "tasks/own.yaml"}, TASK | {"tasks/helper.py": ""}, "tasks/helper.py"),
}


@pytest.mark.parametrize("when", ["before the stage", "while it reads", "there and back"])
@pytest.mark.parametrize("what", NAMED)
def test_whatever_settings_name_is_read_as_what_its_key_stands_for(module, tmp_path, monkeypatch, capfd, what, when):
    name, given, files, changing = NAMED[what]
    monkeypatch.chdir(tmp_path)
    for file, text in files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
    spec = dataclasses.replace(SPECS[name], run="adder.fake")
    monkeypatch.setitem(stage_runner.SPECS, name, spec)
    settings = spec.settings.model_validate(given)
    identity = spec.identity(settings, spec.section, FileDigests(tmp_path / "elsewhere.json", tmp_path))

    def exchange(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(changing)

    def run(settings, inputs: dict[str, Path], out: Path, context: Context) -> dict[str, int]:
        module.runs += 1
        if when != "before the stage":
            exchange("another: text")
            Path(changing).read_text()
        if when == "there and back":
            exchange(files[changing])
        (out / "result.txt").write_text("made of another")
        return {}

    module.run = run
    if when == "before the stage":
        exchange("another: text")
    with pytest.raises(SystemExit):
        execute(tmp_path, {}, name=name, settings=settings.model_dump(mode="json"), identity=identity)
    said = capfd.readouterr().err
    assert ("changed since the workflow began" if when == "before the stage" else "changed while being read") in said
    assert Path(changing).name in said or Path(changing).parent.name in said
    assert not (tmp_path / "results" / "stages" / name / "k").exists()
    assert module.runs == (when != "before the stage")


@pytest.mark.parametrize("content", ["two", "one"])
def test_a_file_that_is_exchanged_while_it_is_read_is_noticed(module, tmp_path, named_file, capfd, content):
    """Also where the file is the old one again in the end: nobody knows which was read."""
    run = module.run

    def exchanging(settings, inputs: dict[str, Path], out, context):
        other = named_file.with_suffix(".new")
        other.write_text(content)
        other.replace(named_file)
        return run(settings, inputs, out, context)

    module.run = exchanging
    identity = FileDigests(tmp_path / "elsewhere.json", tmp_path).of(named_file)
    with pytest.raises(SystemExit):
        execute(tmp_path, {}, identity=identity)
    assert f"{named_file}: changed while being read" in capfd.readouterr().err
    assert not (tmp_path / "results" / "stages" / "format" / "k").exists()
    module.run = run
    execute(tmp_path, {}, identity=FileDigests(tmp_path / "elsewhere.json", tmp_path).of(named_file))
    assert module.runs == 2
