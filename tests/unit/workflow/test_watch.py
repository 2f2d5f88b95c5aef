"""The live page says how each stage stands, by what is on disk."""

import socket
import time
import urllib.request

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from adder.core.display.status import StageStatus, status_file, write_status
from adder.core.errors import UserError
from adder.core.files import write_jsonl
from adder.core.machine import energy
from adder.workflow import cli, watch
from adder.workflow.stage_graph import runs_of
from page_parser import Page

NOW = time.time()


@pytest.fixture
def runs(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"source": str(tiny_model_dir)},
        "data": {"sources": [{"builtin": "tickets", "rows": 40}], "heldout": {"share": 0.2}},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return {run: found.stages for run, found in runs_of(config).items()}


def status(results, stage, **what):
    file = status_file(results / "logs" / stage.name / f"{stage.key}.log")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_status(file, StageStatus(at=what.pop("at", NOW), **what))


def running(results, stage):
    (results / stage.folder).with_name(f".{stage.key}.partial").mkdir(parents=True)


def lines(runs, results, now=None):
    return {line.name: line for line in watch.gather(runs, results, now or time.time()).stages}


def test_each_state_is_told(runs, tmp_path):
    results, stages = tmp_path / "results", runs["default"]
    assert cli.main(["stage", "data", "my.yaml", "--out", str(results / stages["data"].folder)]) == 0
    running(results, stages["model"])
    status(results, stages["model"], text="digesting the weights", left=65.0, at=time.time())
    status(results, stages["format"], error="no row can be used")
    found = lines(runs, results)
    assert found["model"].state == "running"
    assert found["model"].text.startswith("digesting the weights; about 1:0")
    assert (found["format"].state, found["format"].text) == ("failed", "no row can be used")
    assert found["train"].state == "waiting"
    late = lines(runs, results, time.time() + 3600)
    assert late["model"].state == "silent" and "nothing heard for" in late["model"].text


def test_what_is_left_is_told_once_it_is_known(runs, tmp_path, monkeypatch):
    results, stages = tmp_path / "results", runs["default"]
    running(results, stages["model"])
    status(results, stages["model"], text="digesting the weights", left=65.0)
    assert [name for name, _ in watch.gather(runs, results, NOW).about] == ["Stages"], "no row is counted yet"
    monkeypatch.setattr("adder.workflow.terminal.outlook.is_counted", lambda *known: True)
    left = dict(watch.gather(runs, results, NOW).about)["Left"]
    assert left.startswith("about ") and left.endswith("one stage after another")


def test_a_stage_that_has_finished_says_what_came_out(runs, tmp_path, monkeypatch):
    record = {"summary": {"rows": 40, "sources": 1, "unreadable": 0}, "seconds": 3.2, "energy_joules": 96.0}
    monkeypatch.setattr(watch, "read_record", lambda folder: record if folder.parent.name == "data" else None)
    line = lines(runs, tmp_path)["data"]
    assert (line.state, line.took.replace("\u00a0", " ")) == ("done", "3 s, 96 J") and "40" in line.text


def test_a_training_shows_its_curves_and_last_replies(runs, tmp_path):
    results, train = tmp_path / "results", runs["default"]["train"]
    running(results, train)
    status(results, train, text="step 3 of 9")
    with SummaryWriter(str(results / "tensorboard" / "abc")) as writer:
        for step in range(1, 4):
            writer.add_scalar("train/loss", 3.0 / step, step)
            writer.add_scalar("train/grad_norm", 1.0 / step, step)
    row = {"id": "a", "prompt": "p", "reference": "r", "exact_match": 0.0, "finished": True}
    (results / "checkpoints" / "abc").mkdir(parents=True)
    replies = [{**row, "step": 0, "reply": "first"}, {**row, "step": 3, "reply": "<b>last</b>"}]
    write_jsonl(results / "checkpoints" / "abc" / "samples.jsonl", replies)
    page = watch.gather(runs, results, NOW)
    assert [plot.count("<svg") for plot in page.curves] == [1, 1]
    assert [row["reply"] for row in page.samples] == ["<b>last</b>"]
    text = watch.write(results, page).read_text()
    shown = Page(text)
    assert shown.stack == [] and "&lt;b&gt;last&lt;/b&gt;" in text and "first" not in " ".join(shown.text)


def test_the_machines_power_is_told_where_it_has_a_counter(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert " W" not in dict(watch.machine())["CPU"]
    counted = iter((2.0, 12.0, 13.0))
    monkeypatch.setattr(watch, "rapl_counters", lambda: [energy.Counter("cpu", lambda: next(counted))])
    assert dict(watch.machine())["CPU"].endswith(" W")


def test_the_page_is_served_until_it_is_ended(runs, tmp_path, monkeypatch):
    said = []

    def once(seconds):
        if len(said) < 2:  # not this module's own sleep
            return
        address = said[1].split()[0]
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert b"Adder, live" in answer.read()
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", once)
    watch.watch(runs, tmp_path / "results", 1.0, 0, said.append)
    assert said[0].startswith("file:///")


def test_the_command_writes_the_page(runs, tmp_path, capsys):
    assert cli.main(["watch", "my.yaml", "--once"]) == 0
    assert (tmp_path / "results" / "live.html").exists()
    assert "live.html" in capsys.readouterr().out


def test_a_port_that_is_taken_is_refused(runs, tmp_path):
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(UserError, match="name another --port"):
        watch.watch(runs, tmp_path / "results", 1.0, taken.getsockname()[1], print)
