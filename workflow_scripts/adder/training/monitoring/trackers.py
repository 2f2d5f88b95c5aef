"""Curves live: TensorBoard, Weights & Biases, MLflow and trackio, none of which can harm the training.

Each is transformers' own callback behind a guard. The guard lets it see numbers only (never the model, a checkpoint or
the trainer's control), keeps the generators of random numbers and the environment as they were, bounds the time that
training waits for it, and turns it off with one line of warning when anything goes wrong.

Where the three with a service write is theirs to decide: WANDB_MODE=offline, MLFLOW_TRACKING_URI=file:..., TRACKIO_DIR
keep everything on this machine.
"""

import atexit
import copy
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from adder.core.files import atomic_write, read_json, write_json
from adder.core.progress import Progress
from adder.core.rng import undisturbed
from adder.core.secrets import SECRET_NAME, scrubbed

# Training waits for a tracker so long in all, seconds: a service starts in a few, a row takes milliseconds.
PATIENCE = 30.0
# And for so much of the training's time on top, so that a slow disk does not add up to "off" in a run of days.
SHARE = 0.02
PROJECT = "adder"
Result = TypeVar("Result")


class Record(TypedDict):
    """What is kept of a run: its id at the service, a digest of its settings, the last step of each kind of row."""

    id: str
    training: str
    logged: dict[str, int]
    finished: bool


def callbacks(
    report_to: list[str], folder: Path, run_name: str, settings: Mapping[str, Any], progress: Progress
) -> list[TrainerCallback]:
    """One guarded callback for each name in `report_to`: "tensorboard", "wandb", "mlflow" or "trackio".

    `folder`: TensorBoard's files go to `folder/tensorboard/<run_name>`; what a continued run of another tracker has to
    know goes to `folder/trackers/<tracker>/<run_name>.json`. `settings` are logged beside the curves, secrets left out.
    Raises nothing: a tracker that isn't installed or can't write says so in one line when training begins. Call
    `close_all` after the last evaluation.
    """
    # A class of its own for each: the trainer warns of two callbacks of one class.
    kinds = {name: type(f"{name.capitalize()}Tracker", (Tracker,), {}) for name in report_to}
    return [kind(name, Place(folder, name, run_name), settings, progress) for name, kind in kinds.items()]


@dataclass(frozen=True)
class Place:
    """Where a tracker keeps a run."""

    folder: Path
    tracker: str
    run_name: str

    @property
    def events(self) -> Path:
        """TensorBoard's folder of this run."""
        return self.folder / "tensorboard" / self.run_name

    @property
    def record(self) -> Path:
        """What a continued run has to know: its id at the service and the rows that are there already."""
        return self.folder / "trackers" / self.tracker / f"{self.run_name}.json"


class Tracker(TrainerCallback):
    """Guards one of transformers' callbacks: `start` makes it, `on_log` passes rows on, `on_train_end` closes it."""

    running: ClassVar[dict[str, "Tracker"]] = {}  # a process holds one run of a service at a time

    def __init__(self, name: str, place: Place, settings: Mapping[str, Any], progress: Progress):
        self.name, self.place, self.settings, self.progress = name, place, settings, progress
        self.inner: TrainerCallback | None = None
        self.record = Record(id="", training="", logged={}, finished=False)
        self.ended = False
        self.worker: Worker | None = None
        self.began = self.spent = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the tracker, or continue where an earlier process was killed."""
        if not state.is_world_process_zero:
            return
        assert model is not None
        if self.name in Tracker.running:
            Tracker.running[self.name].close()
        self.worker, self.began, self.spent, self.ended = Worker(self.name), time.monotonic(), 0.0, False
        Tracker.running[self.name] = self
        args = copy.copy(args)
        args.run_name = self.place.run_name

        def start() -> TrainerCallback:
            self.record, continued = _record(self.place, args, state, self.settings)
            began = Start(
                self.place, self.record, continued, args, state, copy.copy(control), Facts(model, self.settings)
            )
            return START[self.name](began)

        self.inner = self._call(start)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass a row on, unless an earlier process already did."""
        inner = self.inner
        if inner is None or not logs:
            return
        row = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        kind = " ".join(sorted(row))
        # A continued run computes the steps since its checkpoint again; TensorBoard's reader drops the old ones itself.
        if self.name == "tensorboard" or state.global_step > self.record["logged"].get(kind, -1):

            def log() -> None:
                inner.on_log(args, state, copy.copy(control), logs=row, model=None)
                if self.name != "tensorboard":
                    self.record["logged"][kind] = state.global_step
                    _keep(self.place.record, self.record)

            self._call(log)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the tracker; where an evaluation still follows, since the last step had none, `close_all` does."""
        evaluated = any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)
        self.ended = True
        if evaluated or args.eval_strategy == "no":
            self.close()

    def close(self) -> None:
        """End the tracker's run, as failed if the training did not come to its end."""
        inner, self.inner = self.inner, None
        if inner is not None:

            def end() -> None:
                STOP[self.name](inner, not self.ended)
                if self.ended and self.name != "tensorboard":
                    _keep(self.place.record, {**self.record, "finished": True})

            self._call(end)
        self._release()

    def _call(self, function: Callable[[], Result]) -> Result | None:
        """The function's result, from the tracker's thread; None, and the tracker is off, where it fails or hangs."""
        assert self.worker is not None
        start = time.monotonic()
        left = PATIENCE + SHARE * (start - self.began) - self.spent
        environment = dict(os.environ)
        try:
            with undisturbed():
                return self.worker.call(function, max(left, 0.0))
        except TimeoutError:
            self._off(f"training waited {self.spent + time.monotonic() - start:.0f} s for it", hangs=True)
        except Failure as failure:
            self._off(_reason(failure.error))
        finally:
            self.spent += time.monotonic() - start
            _restore(environment)
        return None

    def _off(self, reason: str, hangs: bool = False) -> None:
        self.progress.note(f"{self.name} is off ({reason}); training goes on without it")
        inner, self.inner = self.inner, None
        if inner is not None and self.worker is not None and not hangs:
            try:
                with undisturbed():
                    self.worker.call(lambda: STOP[self.name](inner, True), PATIENCE / 10)
            except (Failure, TimeoutError):
                pass  # it has been said that it is off
        self._release()

    def _release(self) -> None:
        self.inner = None
        if self.worker is not None:
            self.worker.stop()
        if Tracker.running.get(self.name) is self:
            del Tracker.running[self.name]


@atexit.register
def close_all() -> None:
    """Close what is still open: after the last evaluation, or, when the process ends, for a training that raised."""
    for tracker in list(Tracker.running.values()):
        tracker.close()


class Failure(Exception):
    """What a tracker raised, of whatever kind."""

    def __init__(self, error: BaseException):
        super().__init__(str(error))
        self.error = error


class Worker:
    """A thread of its own for one tracker, since some keep their state by thread, and so that it can be left behind."""

    def __init__(self, name: str):
        self.tasks: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True).start()

    def call(self, function: Callable[[], Result], seconds: float) -> Result:
        """The function's result. Raises Failure with what it raised, TimeoutError after `seconds`."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.tasks.put((function, answer))
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise Failure(error) from error
        return result

    def stop(self) -> None:
        """Let the thread end once it is free."""
        self.tasks.put(None)

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            function, answer = task
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))


@dataclass(frozen=True)
class Start:
    """What a tracker is started with; `continued`: whether it goes on with a run that an earlier process began."""

    place: Place
    record: Record
    continued: bool
    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    facts: "Facts"


class Facts(torch.nn.Module):
    """Stands for the model: its configuration and size. It has no weights that a tracker could hook into or upload."""

    def __init__(self, model: torch.nn.Module, settings: Mapping[str, Any]):
        super().__init__()
        self.config = Configuration(model, settings)
        self.parameters_in_all = sum(parameter.numel() for parameter in model.parameters())

    def num_parameters(self) -> int:
        """Parameters of the model, as stored (an NF4 byte holds two)."""
        return self.parameters_in_all


class Configuration:
    """The model's configuration and the settings of the training, as transformers' callbacks ask for them."""

    def __init__(self, model: torch.nn.Module, settings: Mapping[str, Any]):
        config = getattr(model, "config", None)
        known = json.loads(config.to_json_string(use_diff=False)) if config is not None else {}
        known.pop("_name_or_path", None)  # a path on this machine
        self.values = known | {f"train.{name}": value for name, value in public(settings).items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, flat but for the model's own nested parts."""
        return dict(self.values)

    def to_json_string(self) -> str:
        """The same as text."""
        return json.dumps(self.values, indent=2, sort_keys=True, default=str)


def public(value: Any) -> Any:
    """Settings without what gives access: values under telling names, passwords in URLs, values of such variables."""
    if isinstance(value, dict):
        return {name: public(inner) for name, inner in value.items() if not SECRET_NAME.search(str(name))}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    return scrubbed(value) if isinstance(value, str) else value


def _start_tensorboard(start: Start) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter

    # Readers drop what earlier files of this folder hold from that step on: the steps that a killed run computes again,
    # or, from 0 on, the run of the same name before.
    again = start.state.global_step + 1 if start.state.global_step else 0
    start.place.events.mkdir(parents=True, exist_ok=True)
    # Readers take the files in the order of the seconds in their names.
    seconds = [int(path.name.split(".")[3]) for path in start.place.events.glob("events.out.tfevents.*.*")]
    time.sleep(min(max(0.0, max(seconds, default=0) + 1 - time.time()), 1.0))
    inner = TensorBoardCallback(SummaryWriter(log_dir=str(start.place.events), purge_step=again))
    if not start.state.global_step:
        inner.on_train_begin(start.args, start.state, start.control, model=start.facts)
    return inner


def _start_wandb(start: Start) -> TrainerCallback:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its maker's statistics; gone again after the call
    import wandb

    local = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if not local and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no API key: use `wandb login`, or WANDB_MODE=offline")
    inner = WandbCallback()
    inner._log_model = type(inner._log_model).FALSE  # curves only: uploading adapters is not a tracker's business here
    limits = {
        name: PATIENCE * 0.7 for name in ("init_timeout", "finish_timeout") if f"WANDB_{name.upper()}" not in os.environ
    }
    # What the terminal shows and what the working tree looks like stay here.
    options: dict[str, Any] = {"console": "off", "disable_git": True, "disable_code": True, **limits}
    quiet = wandb.Settings(**options)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=start.place.run_name,
        id=os.environ.get("WANDB_RUN_ID") or start.record["id"],
        resume="allow" if start.continued and not local else None,
        settings=quiet,
    )
    start.record["id"] = run.id
    inner.on_train_begin(start.args, start.state, start.control, model=start.facts)
    return inner


def _start_mlflow(start: Start) -> TrainerCallback:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its maker's statistics; gone again after the call
    import mlflow

    inner = MLflowCallback()
    if not start.continued:
        inner.on_train_begin(start.args, start.state, start.control, model=start.facts)
    else:
        # The parameters are there, and may not change.
        mlflow.start_run(run_id=start.record["id"])
        inner._initialized = inner._auto_end_run = True
    # Row by row: what is logged is then written, whatever comes after.
    inner._async_log = False
    active = mlflow.active_run()
    assert active is not None
    start.record["id"] = active.info.run_id
    return inner


def _start_trackio(start: Start) -> TrainerCallback:
    import trackio

    inner = TrackioCallback()
    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=start.place.run_name,
        resume="allow" if start.continued else "never",
        embed=False,
        config=start.facts.config.to_dict() | {"model/num_parameters": start.facts.num_parameters()},
    )
    inner._initialized = True
    return inner


def _stop_tensorboard(inner: TrainerCallback, failed: bool) -> None:
    assert isinstance(inner, TensorBoardCallback) and inner.tb_writer is not None
    inner.tb_writer.close()


def _stop_wandb(inner: TrainerCallback, failed: bool) -> None:
    assert isinstance(inner, WandbCallback)
    inner._wandb.finish(exit_code=int(failed))


def _stop_mlflow(inner: TrainerCallback, failed: bool) -> None:
    assert isinstance(inner, MLflowCallback)
    inner._ml_flow.end_run("FAILED" if failed else "FINISHED")


def _stop_trackio(inner: TrainerCallback, failed: bool) -> None:
    assert isinstance(inner, TrackioCallback)
    inner._trackio.finish()


START = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "mlflow": _start_mlflow,
    "trackio": _start_trackio,
}
STOP = {
    "tensorboard": _stop_tensorboard,
    "wandb": _stop_wandb,
    "mlflow": _stop_mlflow,
    "trackio": _stop_trackio,
}


def _record(
    place: Place, args: TrainingArguments, state: TrainerState, settings: Mapping[str, Any]
) -> tuple[Record, bool]:
    """The record of a run, and whether it goes on with one that an earlier process began.

    It does so where folder and settings are the same and that process either came to a checkpoint or never ended.
    """
    text = json.dumps([args.output_dir, settings], sort_keys=True, default=str)
    training = blake2b(text.encode(), digest_size=8).hexdigest()
    try:
        known: Record = read_json(place.record)
        if known["training"] == training and (state.global_step > 0 or not known["finished"]):
            return {**known, "finished": False}, True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or none of ours
    # Not from `random`: its state is the training's.
    return Record(id=secrets.token_hex(6), training=training, logged={}, finished=False), False


def _keep(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        write_json(partial, record)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _reason(error: BaseException) -> str:
    """One short line of what went wrong, without secrets."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = scrubbed(lines[0] if lines else "")
    text = text if len(text) <= 160 else f"{text[:159]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
