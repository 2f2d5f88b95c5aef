"""A page that shows a configuration's runs as they go: `adder watch`. It only reads what stages leave on disk."""

import http.server
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from adder.core.display.status import StageStatus, read_status, status_file
from adder.core.errors import UserError
from adder.core.files import atomic_write, read_jsonl
from adder.core.machine.energy import measured, rapl_counters
from adder.core.machine.graphics_cards import said_by
from adder.core.progress import duration
from adder.core.stage_record import StageRecord
from adder.report import plots
from adder.report.formatting import energy, number
from adder.report.html_page import render
from adder.training.records import SampleRow
from adder.workflow.stage_graph import Stage
from adder.workflow.stage_runner import read_record
from adder.workflow.terminal.closing import finished_runs
from adder.workflow.terminal.outlook import Outlook
from adder.workflow.terminal.plan import Plan, planned_stages
from adder.workflow.terminal.story import result, rounded

PAGE = "live.html"
SILENT = 300.0  # seconds without a word, after which a stage may have been killed
LOOK = 0.2  # seconds, over which the machine's load is measured
MOST_POINTS = 2000  # of a curve, as TensorBoard's reader thins it

State = Literal["done", "running", "silent", "failed", "waiting"]


class StageLine(NamedTuple):
    """A stage: what it is called, how it stands, what it says or what came out of it, how long it took."""

    name: str
    state: State
    text: str
    took: str


class LivePage(NamedTuple):
    """What the page shows. about, machine: (name, value). curves: plots as SVG. notices: of all stages."""

    title: str
    at: str
    about: Sequence[tuple[str, str]]
    stages: Sequence[StageLine]
    notices: Sequence[str]
    verdicts: Sequence[tuple[str, str]]
    curves: Sequence[str]
    samples: Sequence[SampleRow]
    machine: Sequence[tuple[str, str]]


def gather(runs: Mapping[str, Mapping[str, Stage]], results: Path, now: float) -> LivePage:
    """Read how all stages of the runs stand. now: seconds of the clock."""
    plan = Plan(results, tuple(runs), planned_stages(runs))
    lines, notices, training = [], [], []
    running: dict[str, StageStatus] = {}
    for folder, planned in plan.stages.items():
        stage, label = planned.stage, plan.label(folder)
        status = read_status(status_file(results / "logs" / stage.name / f"{stage.key}.log"))
        line = _line(label, stage, status, results, now)
        lines.append(line)
        if line.state in ("running", "silent"):
            running[folder] = status
        if line.state != "done":
            plan.jobs.append(folder)
        if line.state != "waiting":
            notices += [f"{label}: {text.removeprefix('warning: ')}" for text in status.notices]
        training += [stage] if stage.name == "train" and line.state in ("running", "silent") else []
    done = sum(line.state == "done" for line in lines)
    return LivePage(
        title=", ".join(list(runs)[:4]) + (" …" if len(runs) > 4 else ""),
        at=time.strftime("%H:%M:%S", time.localtime(now)),
        about=[("Stages", f"{done} of {len(lines)} done"), *_time_left(plan, running, now)],
        stages=lines,
        notices=list(dict.fromkeys(notices)),
        verdicts=[(run.name, run.sentence) for run in finished_runs(tuple(runs), results)],
        # Which curves belong to which stage isn't written down before the end: shown is what must be the only one's.
        curves=list(curves(_newest(results / "tensorboard"))) if len(training) == 1 else [],
        samples=latest_samples(_newest(results / "checkpoints")) if len(training) == 1 else [],
        machine=list(machine()),
    )


def _time_left(plan: Plan, running: Mapping[str, StageStatus], now: float) -> Iterator[tuple[str, str]]:
    """What is left of all runs, while something runs and as far as it is known."""
    if running and (left := Outlook.of(plan).left(running, now)).is_known:
        yield "Left", f"about {rounded(left.seconds)}, one stage after another"


def _line(label: str, stage: Stage, status: StageStatus, results: Path, now: float) -> StageLine:
    folder = results / stage.folder
    record: StageRecord | None = read_record(folder)
    if record is not None:
        used = f", {energy(record['energy_joules'])}" if "energy_joules" in record else ""
        return StageLine(label, "done", result(stage.spec, record["summary"]), f"{duration(record['seconds'])}{used}")
    if status.error:
        return StageLine(label, "failed", status.error, "")
    partial_folder = folder.with_name(f".{stage.key}.partial")
    if not partial_folder.exists():
        return StageLine(label, "waiting", "", "")
    began = partial_folder.stat().st_ctime
    silent = now - max(status.at, began)
    if silent > SILENT:
        return StageLine(label, "silent", f"nothing heard for {duration(silent)}; before that: {status.text}", "")
    left = "" if status.left is None else f"; about {duration(max(status.left - (now - status.at), 0.0))} left"
    return StageLine(label, "running", f"{status.text}{left}", duration(now - began))


def _newest(folder: Path) -> Path | None:
    """The folder in `folder` in which something changed last."""
    found = [path for path in folder.glob("*") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def curves(folder: Path | None) -> Iterator[str]:
    """Plots of what TensorBoard's files in a folder have of a training: loss, held-out loss, rate, gradient norm."""
    if folder is None:
        return
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: MOST_POINTS})
    events.Reload()
    tags: list[str] = events.Tags()["scalars"]

    def series(tag: str, name: str, kind: str, dots: bool = False) -> list[plots.Series]:
        points = [(float(one.step), float(one.value)) for one in events.Scalars(tag)] if tag in tags else []
        return [plots.Series(name, kind, points, dots)] if points else []

    for title, of in (
        ("Loss", [*series("train/loss", "training", "tuned"), *series("eval/loss", "held out", "heldout", dots=True)]),
        ("Gradient norm", series("train/grad_norm", "gradient norm", "base")),
        ("Tokens a second", series("train/tokens_per_second", "tokens a second", "base")),
    ):
        if plot := plots.lines(of, "step", number, title, from_zero=False, adapt=title == "Loss"):
            yield f"<figure><figcaption>{title}</figcaption>{plot}</figure>"


def latest_samples(folder: Path | None) -> list[SampleRow]:
    """The replies of the last step that has any."""
    file = folder and next(folder.rglob("samples.jsonl"), None)
    if not file:
        return []
    try:
        rows: list[SampleRow] = list(read_jsonl(file))
    except (OSError, ValueError):  # it is being written
        return []
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] == last]


def machine() -> Iterator[tuple[str, str]]:
    """How busy this machine is: cores, main memory, and each NVIDIA GPU, with their power where that is told."""
    memory, began = psutil.virtual_memory(), time.monotonic()
    with measured(rapl_counters()) as meter:
        busy = psutil.cpu_percent(LOOK)
        used = meter.joules()
    power = f", {used['cpu'] / (time.monotonic() - began):.0f} W" if "cpu" in used else ""
    yield "CPU", f"{busy:.0f} % of {psutil.cpu_count()} cores{power}"
    yield "Memory", f"{(memory.total - memory.available) / 1e9:.1f} of {memory.total / 1e9:.1f} GB"
    asked = "name,utilization.gpu,memory.used,memory.total,power.draw"
    for line in said_by("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader").splitlines():
        name, *figures = [cell.strip() for cell in line.split(",")]
        yield name, "{} busy, {} of {}, {}".format(*figures) if len(figures) == 4 else line


def write(folder: Path, page: LivePage) -> Path:
    """Write the page into a folder; return its file."""
    with atomic_write(folder / PAGE) as file:
        file.write_text(render("live", page._asdict(), ("report.css", "live.css")), encoding="utf-8")
    return folder / PAGE


def watch(
    runs: Mapping[str, Mapping[str, Stage]],
    results: Path,
    every: float,
    port: int | None,
    say: Callable[[str], object],
    once: bool = False,
) -> None:
    """Keep the page up to date every so many seconds until Ctrl-C; with `port`, serve it on this machine too.

    Raises UserError where the results can't be written to or nothing can listen at the port.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        file = write(results, gather(runs, results, time.time()))
    except OSError as error:
        raise UserError(f"{results / PAGE}: can't be written: {error.strerror}") from None
    say(f"{file.resolve().as_uri()} shows it, and itself anew every few seconds; Ctrl-C ends this, not the run")
    with suppress(KeyboardInterrupt):
        if port is not None:
            _serve(results, port, say)
        while not once:
            time.sleep(every)
            write(results, gather(runs, results, time.time()))


def _serve(results: Path, port: int, say: Callable[[str], object]) -> None:
    try:
        server = http.server.ThreadingHTTPServer(("localhost", port), partial(_OnePage, file=results / PAGE))
    except OSError as error:
        raise UserError(f"nothing can listen at localhost:{port}: {error.strerror}; name another --port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = server.server_address[1]
    say(f"http://localhost:{at}/ is the same; over ssh: ssh -L {at}:localhost:{at} …")


class _OnePage(http.server.BaseHTTPRequestHandler):
    """Answers each question with the page, whatever its path."""

    def __init__(self, *arguments: object, file: Path) -> None:
        self.file = file
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        content = self.file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the terminal is for people."""
