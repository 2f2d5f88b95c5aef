"""Trackers: real clients see the real curves, and none of them can harm, slow or change a training."""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from adder.core.files import digest_file, read_json, read_jsonl
from adder.core.progress import Progress
from adder.training import trainer
from adder.training.monitoring import trackers
from adder.training.stage import TrainSettings
from tiny import write_training_inputs
from training_stage import run_training, train_settings

ROOT = Path(__file__).resolve().parents[4]
STEPS = 12


def settings(**changes) -> TrainSettings:
    values = {"epochs": 2, "learning_rate": 1e-3, "effective_batch_size": 6, "lora_r": 4, "lora_dropout": 0.1}
    values |= {"compute_dtype": "float32", "eval_samples": 4, "eval_times": 3, "samples": 0}
    return train_settings(**{**values, **changes})


def logged(values: TrainSettings) -> dict:
    """The settings as trackers are given them."""
    return values.model_dump(mode="json")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir):
    return write_training_inputs(tmp_path_factory.mktemp("inputs"), tiny_model_dir)


class Remembered:
    """A progress that remembers what it was told to say."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    note = say


@pytest.fixture
def run(inputs, tmp_path, monkeypatch):
    """run(names, out=..., folder=...): train with these trackers; returns what they said."""
    original = trainer.Trainer.train

    def run(names, out="out", folder=tmp_path / "results", checkpoints=None, stop=None, kill=None, **changes):
        said, values = Remembered(), settings(**changes)

        def with_trackers(self, *args, **kwargs):
            for callback in trackers.callbacks(names, folder, "a-run", logged(values), said):
                self.add_callback(callback)
            if stop or kill:
                self.add_callback(Stop(stop, kill))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(trainer.Trainer, "train", with_trackers)
        (tmp_path / out).mkdir(exist_ok=True)
        runtime = {"checkpoints": 3 if checkpoints else 0, "save_total_limit": 2}
        run_training(values, inputs, tmp_path / out, Progress.silent(), checkpoints=checkpoints, runtime=runtime)
        return said.lines

    yield run
    trackers.close_all()


class Stop(trackers.TrainerCallback):
    """Ends a training at a step, by an exception or as kill -9 does."""

    def __init__(self, stop, kill):
        self.stop, self.kill = stop, kill

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise InterruptedError
        if state.global_step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step, run, *args, **options) -> None:
    """Run in a forked process that kills itself with -9 when step `step` is done."""
    child = os.fork()
    if child == 0:
        # A forked process has none of its parent's OpenMP threads and would wait for them.
        torch.set_num_threads(1)
        try:
            run(*args, kill=step, **options)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), ...]} of a run's metrics.jsonl."""
    found: dict[str, list] = {}
    for row in read_jsonl(folder / "metrics.jsonl"):
        for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
            if name in row:
                found.setdefault(name, []).append((row["step"], row[name]))
    return found


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    """Whether two curves are the same, up to fp32."""
    steps, values = zip(*found, strict=True)
    return list(steps) == [step for step, _ in expected] and values == pytest.approx(
        [value for _, value in expected], rel=1e-6
    )


def adapter(folder: Path) -> dict:
    return {path.name: digest_file(path) for path in sorted((folder / "adapter").iterdir())}


@pytest.fixture(scope="module")
def untracked(inputs, tmp_path_factory) -> Path:
    """The output of a training without trackers."""
    out = tmp_path_factory.mktemp("untracked")
    run_training(settings(), inputs, out, Progress.silent())
    return out


# TensorBoard ----------------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves as TensorBoard's own reader shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboards_reader_sees_the_curves(run, tmp_path, untracked):
    assert run(["tensorboard"]) == []
    found, expected = events(tmp_path / "results" / "tensorboard" / "a-run"), metrics(tmp_path / "out")
    assert [step for step, _ in expected["loss"]] == list(range(1, STEPS + 1)) and len(expected["eval_loss"]) == 3
    for tag, name in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss")):
        assert same(found[tag], expected[name]), tag
    assert adapter(tmp_path / "out") == adapter(untracked)


def test_an_evaluation_after_the_last_step_is_seen_too(run, tmp_path):
    """With evaluations every five of twelve steps the last one follows the end of the training."""
    run(["tensorboard"], eval_times=2, epochs=11 / 6)
    found = events(tmp_path / "results" / "tensorboard" / "a-run")
    assert [step for step, _ in found["eval/loss"]] == [6, 11]


@pytest.mark.parametrize("torn", [False, True])
def test_tensorboard_shows_no_step_twice_after_a_kill(run, tmp_path, torn):
    killed_at(8, run, ["tensorboard"], checkpoints=tmp_path / "c")
    folder = tmp_path / "results" / "tensorboard" / "a-run"
    before = events(folder)["train/loss"]
    assert [step for step, _ in before] == list(range(1, 9)), "rows of a killed run are on disk"
    if torn:
        (file,) = folder.iterdir()
        file.write_bytes(file.read_bytes()[:-5])
    run(["tensorboard"], checkpoints=tmp_path / "c")
    assert read_json(tmp_path / "out" / "train.json")["resumed_from"] == 6
    found, expected = events(folder), metrics(tmp_path / "out")
    assert same(found["train/loss"], expected["loss"]) and same(found["eval/loss"], expected["eval_loss"])


def test_a_run_from_the_start_replaces_the_curves_of_its_name(run, tmp_path):
    run(["tensorboard"], out="first", epochs=3)
    run(["tensorboard"], out="second", learning_rate=2e-3)
    found = events(tmp_path / "results" / "tensorboard" / "a-run")
    assert same(found["train/learning_rate"], metrics(tmp_path / "second")["learning_rate"])


# The three with a service, each kept on this machine ------------------------------------------------------------------


def wandb_rows(file: Path) -> tuple[str, list[dict]]:
    """Run id and logged rows of W&B's transaction log: records of protobuf in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, run_id, rows = file.read_bytes(), 7, b"", None, []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            run_id = record.run.run_id or run_id
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return run_id, rows


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """What a user sets so that nothing leaves the machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    # Both keep where they wrote before.
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def wandb_runs(folder: Path) -> list[tuple[str, list[dict]]]:
    return [wandb_rows(file) for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def curve(rows: list[dict], name: str) -> list[tuple[int, float]]:
    return [(row["train/global_step"], row[name]) for row in rows if name in row]


def test_wandb_offline_holds_the_curves(run, tmp_path, offline, untracked):
    pytest.importorskip("wandb")
    assert run(["wandb"]) == []
    ((_, rows),) = wandb_runs(tmp_path)
    expected = metrics(tmp_path / "out")
    for tag, name in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss")):
        assert same(curve(rows, tag), expected[name]), tag
    assert adapter(tmp_path / "out") == adapter(untracked)


def test_wandb_goes_on_with_the_same_run_and_no_step_twice(run, tmp_path, offline):
    pytest.importorskip("wandb")
    with pytest.raises(InterruptedError):
        run(["wandb"], checkpoints=tmp_path / "c", stop=8)
    trackers.close_all()  # as the end of the process does
    time.sleep(1.1)  # the folders' names have seconds
    run(["wandb"], checkpoints=tmp_path / "c")
    (first, rows), (second, more) = wandb_runs(tmp_path)
    assert first == second and len(curve(rows, "train/loss")) == 8
    assert same(curve(rows + more, "train/loss"), metrics(tmp_path / "out")["loss"])


@pytest.mark.parametrize("store", ["file:{}/mlruns", "sqlite:///{}/runs.db"])
def test_mlflow_on_this_machine_holds_the_curves(run, tmp_path, offline, monkeypatch, store, untracked):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    assert run(["mlflow"]) == []
    found, expected = mlflow_runs(store.format(tmp_path)), metrics(tmp_path / "out")
    ((run_name, status, curves, parameters),) = found
    assert (run_name, status) == ("a-run", "FINISHED")
    for name in ("loss", "learning_rate", "eval_loss"):
        assert same(curves(name), expected[name]), name
    assert parameters["train.lora_r"] == "4" and parameters["hidden_size"] == "64"
    assert adapter(tmp_path / "out") == adapter(untracked)


def mlflow_runs(store: str) -> list[tuple]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)

    def curves(run):
        return lambda name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]

    runs = client.search_runs(["0"])
    return [(run.info.run_name, run.info.status, curves(run), run.data.params) for run in runs]


def test_mlflow_goes_on_with_the_same_run_and_no_step_twice(run, tmp_path, offline):
    pytest.importorskip("mlflow")
    killed_at(8, run, ["mlflow"], checkpoints=tmp_path / "c")
    run(["mlflow"], checkpoints=tmp_path / "c")
    ((_, status, curves, _),) = mlflow_runs(f"file:{tmp_path / 'mlruns'}")
    assert status == "FINISHED" and read_json(tmp_path / "out" / "train.json")["resumed_from"] == 6
    assert same(curves("loss"), metrics(tmp_path / "out")["loss"])
    assert same(curves("eval_loss"), metrics(tmp_path / "out")["eval_loss"])
    run(["mlflow"], out="anew")
    assert len(mlflow_runs(f"file:{tmp_path / 'mlruns'}")) == 2, "from the start again it is another run"


def test_mlflow_calls_a_training_that_raised_failed(run, tmp_path, offline):
    pytest.importorskip("mlflow")
    with pytest.raises(InterruptedError):
        run(["mlflow"], stop=4)
    trackers.close_all()
    ((_, status, _, _),) = mlflow_runs(f"file:{tmp_path / 'mlruns'}")
    assert status == "FAILED"


IN_A_PROCESS = """
import json, sys
from pathlib import Path
from adder.core.progress import Progress
from adder.training import trainer
from adder.training.monitoring import trackers
from training_stage import run_training, train_settings
names, settings, inputs, folder, runs, patience = json.loads(sys.argv[1])
trackers.PATIENCE = patience
original = trainer.Trainer.train
def with_trackers(self, *args, **kwargs):
    for callback in trackers.callbacks(names, Path(folder) / "results", "a-run", settings, Progress()):
        self.add_callback(callback)
    return original(self, *args, **kwargs)
trainer.Trainer.train = with_trackers
for number in range(runs):
    out = Path(folder) / f"out-{number}"
    out.mkdir()
    run_training(train_settings(**settings), {name: Path(path) for name, path in inputs.items()}, out)
"""


def in_a_process(
    names, inputs, folder, environment, runs=1, patience=30, terminal=False
) -> subprocess.CompletedProcess:
    """Train in a process of its own, for clients that read their environment when they are imported.

    With `terminal` it has one, and what it says is in `stdout`.
    """
    paths = {name: str(path) for name, path in inputs.items()}
    arguments = json.dumps([names, settings().model_dump(mode="json"), paths, str(folder), runs, patience])
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'workflow_scripts'}{os.pathsep}{ROOT / 'tests'}"} | environment
    command = [sys.executable, "-c", IN_A_PROCESS, arguments]
    if terminal:
        command = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, stdin=subprocess.PIPE)


def test_trackio_on_this_machine_holds_the_curves(inputs, tmp_path, untracked):
    pytest.importorskip("trackio", reason="trackio is not installed: it needs pillow < 13, the lock has 13")
    import sqlite3

    process = in_a_process(["trackio"], inputs, tmp_path, {"TRACKIO_DIR": str(tmp_path / "trackio")}, runs=2)
    assert process.returncode == 0, process.stderr[-2000:]
    rows: dict[str, list] = {}
    with sqlite3.connect(tmp_path / "trackio" / "adder.db") as database:
        for run_id, text in database.execute("select run_id, metrics from metrics order by id"):
            rows.setdefault(run_id, []).append(json.loads(text))
    assert len(rows) == 2, "two trainings of one name are two runs"
    for number, logged in enumerate(rows.values()):
        expected = metrics(tmp_path / f"out-{number}")
        for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
            assert same(curve(logged, tag), expected[name]), tag
    assert adapter(tmp_path / "out-0") == adapter(untracked)


@pytest.mark.slow
def test_no_network_costs_a_line_and_a_bounded_time(inputs, tmp_path, untracked):
    """Nothing listens at port 9: W&B would try for a minute and a half, MLflow for longer."""
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    environment = {
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "MLFLOW_TRACKING_URI": "http://someone:hunter22@127.0.0.1:9",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    start = time.monotonic()
    process = in_a_process(["wandb", "mlflow"], inputs, tmp_path, environment, patience=3)
    assert process.returncode == 0, process.stderr[-2000:]
    assert len(re.findall(r"^(?:wandb|mlflow) is off \(.*\); training goes on", process.stderr, re.MULTILINE)) == 2
    assert time.monotonic() - start < 75, "neither the training nor the end of the process waits"
    assert "hunter22" not in process.stderr + process.stdout
    assert adapter(tmp_path / "out-0") == adapter(untracked)


def test_wandb_without_a_key_does_not_ask_for_one(inputs, tmp_path, monkeypatch, untracked):
    """Even on a terminal, where it would wait for an answer."""
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    environment = {"NETRC": str(tmp_path / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    said = in_a_process(["wandb"], inputs, tmp_path, environment, terminal=True).stdout
    assert re.search(r"wandb is off \(RuntimeError: no API key: use `wandb login`, or WANDB_MODE=offline\)", said)
    assert adapter(tmp_path / "out-0") == adapter(untracked)


# What a tracker may do wrong ------------------------------------------------------------------------------------------


class Broken(trackers.TrainerCallback):
    """A tracker that misbehaves in one of its hooks."""

    def __init__(self, hook, misbehave):
        self.hook, self.misbehave, self.calls = hook, misbehave, []

    def __call__(self, hook):
        self.calls.append(hook)
        if hook == self.hook:
            self.misbehave()

    def start(self, *args):
        self("start")
        return self

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.clear()
        control.should_training_stop = True
        self("log")

    def stop(self, inner, failed):
        self("stop")


@pytest.fixture
def broken(monkeypatch):
    def broken(hook, misbehave):
        tracker = Broken(hook, misbehave)
        monkeypatch.setitem(trackers.START, "mlflow", tracker.start)
        monkeypatch.setitem(trackers.STOP, "mlflow", tracker.stop)
        return tracker

    return broken


def fail():
    raise ValueError("went wrong\nin a second line")


@pytest.mark.parametrize("hook", ["start", "log", "stop"])
@pytest.mark.parametrize("misbehave", [fail, sys.exit, lambda: next(iter([]))])
def test_a_tracker_that_raises_costs_one_line(run, broken, tmp_path, untracked, hook, misbehave):
    tracker = broken(hook, misbehave)
    (line,) = run(["mlflow", "tensorboard"])
    assert re.fullmatch(r"mlflow is off \((ValueError: went wrong|SystemExit|StopIteration)\); training goes .*", line)
    assert tracker.calls.count(hook) == 1
    assert adapter(tmp_path / "out") == adapter(untracked)
    assert same(
        events(tmp_path / "results" / "tensorboard" / "a-run")["train/loss"], metrics(tmp_path / "out")["loss"]
    ), "the others go on"


def test_random_numbers_environment_and_control_are_the_trainings(run, broken, tmp_path, untracked, monkeypatch):
    monkeypatch.setenv("KEPT", "1")

    def meddle():
        random.random(), np.random.rand(), torch.rand(3)
        torch.manual_seed(1)
        os.environ["LEFT_BEHIND"] = "1"
        del os.environ["KEPT"]

    for hook in ("start", "log", "stop"):
        broken(hook, meddle)
        before = dict(os.environ)
        assert run(["mlflow"], out=hook) == []
        assert dict(os.environ) == before
        assert adapter(tmp_path / hook) == adapter(untracked)
        assert read_json(tmp_path / hook / "train.json")["steps"] == STEPS


@pytest.mark.parametrize("hook", ["start", "log", "stop"])
def test_a_tracker_that_hangs_is_left_behind(run, broken, tmp_path, untracked, monkeypatch, hook):
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    tracker = broken(hook, lambda: time.sleep(30))
    start = time.monotonic()
    (line,) = run(["mlflow"])
    assert time.monotonic() - start < 15
    assert line.startswith("mlflow is off (training waited 0 s for it)") and tracker.calls.count(hook) == 1
    assert adapter(tmp_path / "out") == adapter(untracked)


def test_a_slow_tracker_is_off_once_it_has_cost_too_much(run, broken, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)
    tracker = broken("log", lambda: time.sleep(0.12))
    (line,) = run(["mlflow"])
    assert "training waited" in line and 3 <= tracker.calls.count("log") <= 6


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_costs_one_line(run, tmp_path, untracked, monkeypatch, name):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Hidden(name), *sys.meta_path])
    (line,) = run([name])
    assert line == f"{name} is off (the package {name} is not installed); training goes on without it"
    assert adapter(tmp_path / "out") == adapter(untracked)


class Hidden:
    """Makes a package look as if it were not installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_folder_that_cannot_be_written_costs_one_line(run, broken, tmp_path, untracked, name):
    broken(None, None)
    (tmp_path / "file").write_text("not a folder")
    (line,) = run([name], folder=tmp_path / "file")
    assert re.match(rf"{name} is off \((NotADirectoryError|FileExistsError): .*\); training goes on", line)
    assert adapter(tmp_path / "out") == adapter(untracked)


def test_all_at_once_change_nothing_and_leak_nothing(run, tmp_path, offline, untracked):
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    before = dict(os.environ)
    assert run(["tensorboard", "wandb", "mlflow"]) == []
    assert dict(os.environ) == before
    assert adapter(tmp_path / "out") == adapter(untracked)
    assert not trackers.Tracker.running


# Secrets --------------------------------------------------------------------------------------------------------------


def test_no_secret_is_logged(run, tmp_path, offline, monkeypatch):
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    secret = "s3cr3t-value-of-mine"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, secret)
    more = {"api_key": secret, "source": f"https://me:{secret}@host/data?token={secret}", "note": [f"is {secret}"]}
    monkeypatch.setattr(sys.modules[__name__], "logged", lambda values: values.model_dump(mode="json") | more)
    run(["tensorboard", "wandb", "mlflow"])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if secret.encode() in path.read_bytes()] == []
    shown = b"".join(path.read_bytes() for path in written)
    assert b"train.learning_rate" in shown and b"is ${" in shown, "the settings themselves are there"


def test_a_warning_holds_no_secret(run, broken, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")

    def fail():
        raise OSError("no answer from https://me:other-secret@host/api?sig=signed&x=1 (hunter22)")

    broken("log", fail)
    (line,) = run(["mlflow"])
    assert "no answer from https://…@host/api?sig=…&x=1 (${MLFLOW_TRACKING_PASSWORD})" in line
