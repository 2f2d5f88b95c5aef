"""The command `adder`: what it finds, what it refuses, what it leaves alone."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adder.core import file_lock
from adder.core.file_digests import FileDigests
from adder.core.machine import graphics_cards
from adder.workflow import cli, run_folder

CONFIG = "model: {source: a/b}\ndata: {sources: [{builtin: tickets, rows: 9}]}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a configuration, my.yaml."""
    (tmp_path / "my.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_lists_runs_and_stages(folder, capsys):
    (folder / "more.yaml").write_text("runs: {a: {}, b: {train: {epochs: 1}}}")
    assert cli.main(["check", "my.yaml", "more.yaml"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == ["a: 11 stages, of which finished: none", "b: 11 stages, of which finished: none"]
    assert cli.main(["check", "--quiet", "my.yaml"]) == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {epochs: 2, epochs: 3}", "`epochs` stands twice in one section"),
        (CONFIG + "train: {lr: 1}", "train.lr: unknown setting; did you mean `learning_rate`?"),
        (CONFIG.replace("builtin: tickets, rows: 9", "path: gone.csv"), "data.sources.0.path: no file matches"),
    ],
)
def test_check_tells_mistakes_as_the_workflow_does(folder, capsys, text, told):
    (folder / "my.yaml").write_text(text)
    assert cli.main(["check", "my.yaml"]) == 1
    shown = capsys.readouterr()
    assert told in shown.err and shown.err.startswith("adder: ") and "Traceback" not in shown.err and not shown.out


def test_machine_says_what_is_used_and_what_trials_found(folder, capsys, monkeypatch):
    card = graphics_cards.Card(0, "NVIDIA GeForce RTX 3090", (8, 6), 24 * 2**30)
    found = graphics_cards.Surroundings("2.13.0", "CUDA 12.8", (card,), driver="570.124.06", triton="3.8.0")
    monkeypatch.setattr(graphics_cards, "look", lambda: found)
    kept = folder / "results" / "kernel_trials"
    kept.mkdir(parents=True)
    verdict = {"family": "rope", "outcome": "wrong", "why": "was off by 0.5"}
    content = {"machine": {"card": card.name}, "shapes": {"hidden": 2048, "dtype": "bfloat16"}, "verdict": verdict}
    (kept / "rope-1.json").write_text(json.dumps(content))
    assert cli.main(["machine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "GPU 0: NVIDIA GeForce RTX 3090 (24 GiB, compute capability 8.6)"
    assert any(line.startswith("fp8: not used: the card has no fp8 matmuls") for line in lines)
    assert lines[-1] == "rope (hidden size 2,048, bfloat16): isn't used: a trial was off by 0.5"


def test_one_stage_by_hand_writes_beside_the_results(folder, capsys):
    assert cli.main(["stage", "data", "my.yaml", "--out", "here"]) == 0
    assert len((folder / "here" / "rows.jsonl").read_text().splitlines()) == 9
    assert not list(folder.glob("results/stages/*"))
    assert cli.main(["stage", "data", "my.yaml", "--out", "here"]) == 1
    assert "--out here: has files in it already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["format"], "format: not finished is what it reads, data; run the workflow first"),
        (["fromat"], "fromat: run default has no such stage; it has model, data, format"),
        (["data", "--run", "other"], "--run other: there is no such run; there are default"),
    ],
)
def test_a_stage_that_cannot_be_run_by_hand_is_refused(folder, capsys, arguments, told):
    assert cli.main(["stage", *arguments[:1], "my.yaml", *arguments[1:]]) == 1
    assert told in capsys.readouterr().err


# A dead holder elsewhere is watched for a moment only.
IMPATIENT = """
import sys
from adder.core import file_lock
from adder.workflow import cli
file_lock.WATCHED = 0.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def prune(tmp_path):
    """Run `adder prune` for a configuration with nobody at the keyboard; return its exit status and what it says."""
    (tmp_path / "my.yaml").write_text(CONFIG)

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-c", IMPATIENT, "prune", "my.yaml", *arguments]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=tmp_path, **streams)
        return done.returncode, done.stdout

    return run


def test_prune_refuses_while_a_snakemake_writes_or_a_job_that_outlived_one(tmp_path, prune):
    unneeded = tmp_path / "results" / "stages" / "format" / ("0" * 12)
    unneeded.mkdir(parents=True)
    me = rf"\(process {os.getpid()} on .+\)"
    with file_lock.take(tmp_path / "results", "another Snakemake"):
        code, told = prune("--yes")
    assert code == 1
    assert re.fullmatch(rf"adder: another Snakemake {me} is writing to results/; wait for it, or end it\n", told)
    with file_lock.held(unneeded.with_name(".abc.lock"), print):
        code, told = prune("--yes")
    assert code == 1
    place = "results/stages/format/abc"
    assert re.fullmatch(rf"adder: another process {me} is still at work on {place}; wait for it, or end it\n", told)
    assert unneeded.exists()
    left = unneeded.with_name(".killed.lock")
    left.write_text("another process (process 1 on somewhere)")
    os.utime(left, (0, 0))
    assert prune("--yes")[0] == 0 and not unneeded.exists() and not left.exists()


def test_prune_takes_nobody_there_for_a_no_and_makes_no_results(tmp_path, prune):
    assert prune() == (0, "Nothing to prune: there is no results/.\n")
    assert not (tmp_path / "results").exists()
    unneeded = tmp_path / "results" / "stages" / "format" / ("0" * 12)
    unneeded.mkdir(parents=True)
    code, told = prune()
    assert code == 0 and told.endswith("Remove them? [y/N] \nNothing was removed.\n") and unneeded.exists()


def test_a_configuration_that_is_only_read_may_have_mistakes_but_not_as_a_file(folder, capsys):
    (folder / "wrong.yaml").write_text("train: {epochs: -1}")
    (folder / "broken.yaml").write_text("train: {epochs")
    assert cli.main(["check", "--read", "wrong.yaml"]) == 0 and capsys.readouterr().out == ""
    assert cli.main(["check", "--read", "broken.yaml"]) == 1
    assert "broken.yaml, line 1, column " in capsys.readouterr().err


def test_verify_tells_what_is_not_as_it_was_made(folder, capsys):
    (folder / "default").mkdir()
    (folder / "default" / "report.html").write_text("page")
    run_folder.write_record(folder / "default", {}, FileDigests(folder / "digests.json", folder))
    assert cli.main(["verify", "default"]) == 0
    (folder / "default" / "report.html").write_text("another page")
    assert cli.main(["verify", "default"]) == 1
    assert "  - report.html: other content" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_sentence_and_names_reach_no_terminal_raw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "results/\x1b[2J\u202e")

    monkeypatch.setattr(cli.stage_graph, "runs_of", refuse)
    (tmp_path / "my.yaml").write_text("model: {source: x}\n")
    assert cli.main(["check", "my.yaml"]) == 1
    assert capsys.readouterr().err.startswith("adder: results/\\x1b[2J\\u202e: Permission denied; ")
