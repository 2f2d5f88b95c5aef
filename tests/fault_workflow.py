"""A tiny workflow with every stage, run in this process's children, so that a fault costs a second and not ten.

The process imports everything once and forks a child for each start of a stage, which does what Snakemake's job does.
What would start threads here, which a fork doesn't take along, is done in children too: the model is made, the judge
answers.
"""

import contextlib
import importlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from adder.core.file_digests import FileDigests
from adder.core.files import digest_file, write_jsonl
from adder.merging import fresh_process_reply
from adder.workflow import code_digest, requests, run_folder, side_jobs, stage_graph, stage_runner
from adder.workflow.stage_graph import Stage
from adder.workflow.stages import SPECS

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
# What a stage writes about itself, which no two runs have alike.
VOLATILE = {
    "seconds", "tokens_per_second", "finished_at", "energy_joules", "energy_parts", "estimated_seconds",
    "peak_memory_bytes", "free_bytes", "needed_bytes", "resumed_from", "seconds_per_step", "runtime",
    "new_tokens_per_second", "url",
}  # fmt: skip
# And what a file tells of all attempts at it, or of its stages.
OF_ATTEMPTS = {"metrics.json": ("cost", "stages", "judge.tokens"), "judge.json": ("tokens",)}


# What gives access, by the environment variable that has it; it must be in no file.
SECRETS = {
    "HF_TOKEN": "hf_0therWise9Secret",
    "MY_SIGNED": "sig=a/b+c%3D&x=4711secret",
    "MY_ROWS": "rows-secret-0815",
    "OPENAI_API_KEY": "sk-judge-secret-31",
    "WANDB_API_KEY": "wandb-secret-77",
}


def nothing() -> None:
    """No fault."""


@dataclass
class Child:
    """A start of a stage, or of anything else, in a process group of its own."""

    pid: int
    begun: float = field(default_factory=time.monotonic)
    status: int | None = None

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, negative for a signal; None where it lives on after so many seconds."""
        if self.status is not None:
            return self.status
        file = os.pidfd_open(self.pid)
        try:
            if not select.select([file], [], [], seconds)[0]:
                return None
        finally:
            os.close(file)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def kill(self) -> int | None:
        """Kill it, with all that it started; its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait()


def fork(work: Callable[[], object], terminal: Path) -> Child:
    """Do `work` in a child; what it would show goes to `terminal`. SystemExit's status is the child's."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # by whichever comes first
        return Child(pid)
    status = 70
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        for number in (1, 2):
            os.dup2(
                os.open(terminal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if number == 1 else 0)), number
            )
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Workflow:
    """The workflow in `folder`, which becomes the working directory."""

    def __init__(self, folder: Path, **changes: Any):
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        self.terminal, self.results = folder / "terminal.txt", Path("results")
        os.environ.update(SECRETS)
        import_everything()
        self._finished(fork(lambda: write_inputs(folder), self.terminal))
        self.servers = self._servers(folder)
        config = configuration(*self.servers.urls, changes)
        self.stages: dict[str, Stage] = stage_graph.runs_of(config)["default"].stages
        self.lasts: dict[str, float] = {}  # seconds of an undisturbed start
        self.whole: dict[str, dict[str, object]] = {}

    def _servers(self, folder: Path) -> "Servers":
        """A judge and a server of rows, which want to be shown their secrets, in a child."""
        file = folder / "servers.txt"

        def serve() -> None:
            from http_server import serving
            from judge_server import judging

            rows = (folder / "more.jsonl").read_bytes()
            (folder / "more.jsonl").unlink()
            with (
                judging(key=SECRETS["OPENAI_API_KEY"]) as judge,
                serving({"/more.jsonl": rows}, authorization=f"Bearer {SECRETS['MY_ROWS']}") as web,
            ):
                file.with_suffix(".new").write_text(f"{judge.url} {web.url}")
                file.with_suffix(".new").rename(file)
                signal.pause()

        child = fork(serve, folder / "servers.log")
        while not file.exists():
            time.sleep(0.01)
        return Servers(child, file.read_text().split())

    def close(self) -> None:
        """End what was started."""
        self.servers.child.kill()

    def folder_of(self, name: str) -> Path:
        """The folder of a stage."""
        return self.results / self.stages[name].folder

    def begin(self, name: str, fault: Callable[[], object] = nothing) -> Child:
        """Start a stage as a job of Snakemake's does, which removes the record before. `fault` is called first."""
        stage = self.stages[name]
        (self.folder_of(name) / stage_runner.RECORD).unlink(missing_ok=True)
        inputs = {above: self.results / parent.folder for above, parent in stage.parents.items()}
        log = self.results / "logs" / stage.name / f"{stage.key}.log"

        def work() -> None:
            reply_in_this_process()
            fault()
            stage_runner.execute(
                stage.name,
                json.loads(stage.parameters()),
                {"threads": 1, "report_to": [], "checkpoints": 4, "gpus": 1},
                inputs=inputs,
                results=self.results,
                key=stage.key,
                log=log,
            )

        return fork(work, self.terminal)

    def finish(self, name: str) -> None:
        """Start a stage undisturbed. Raises AssertionError where it fails, with what it said."""
        child = self.begin(name)
        self._finished(child)
        self.lasts.setdefault(name, time.monotonic() - child.begun)

    def _finished(self, child: Child) -> None:
        status = child.wait()
        assert status == 0, f"ended with status {status}:\n{self.shown()}"

    def shown(self) -> str:
        """What the last child showed."""
        return self.terminal.read_text(errors="replace")

    def forget(self, name: str) -> None:
        """Remove a stage's folder, what is kept of it and its checkpoints: the next start computes it."""
        record = stage_runner.read_record(self.folder_of(name))
        if record is not None:
            shutil.rmtree(self.results / "cache" / record["stage"] / record["fingerprint"], ignore_errors=True)
        shutil.rmtree(self.folder_of(name), ignore_errors=True)
        shutil.rmtree(self.results / "checkpoints", ignore_errors=True)

    def run_all(self) -> None:
        """Run everything undisturbed and take it for what has to come out."""
        for name in self.stages:
            self.finish(name)
            self.whole[name] = self.outcome(name)

    def outcome(self, name: str) -> dict[str, object]:
        """What a stage wrote, by path: digests, and of what tells times the rest of it. Nothing of a killed one."""
        folder = self.folder_of(name)
        stray = [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")]
        assert not stray, f"{folder.parent} has {stray}"
        record = stage_runner.read_record(folder)
        assert record is not None, f"{folder} has no whole record"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != stage_runner.RECORD]
        assert [str(path.relative_to(folder)) for path in files] == sorted(record["outputs"]), f"{folder}: other files"
        for path in files:
            assert digest_file(path) == record["outputs"][str(path.relative_to(folder))]["digest"], path
        return {str(path.relative_to(folder)): content(path) for path in files if not is_page(path)}

    def assert_whole(self, name: str) -> None:
        """Assert that a stage's folder has what an undisturbed run wrote."""
        found, whole = self.outcome(name), self.whole[name]
        other = {path: differences(found.get(path), whole.get(path)) for path in found.keys() | whole.keys()}
        told = "\n".join(f"{path}: {', '.join(sorted(apart)[:8])}" for path, apart in sorted(other.items()) if apart)
        assert not told, f"{name} came out in another way:\n{told}"

    def assert_no_secrets(self) -> None:
        """Assert that what gives access stands in no file that anything has written, neither as it is nor quoted."""
        forms = {form.encode() for value in SECRETS.values() for form in (value, quote(value), quote(value, safe=""))}
        for path in Path().rglob("*"):
            if path.is_file():
                text = path.read_bytes()
                assert not any(form in text for form in forms), f"{path} has a secret in it"

    def start(self) -> tuple[list[str], list[str]]:
        """Start the whole workflow as Snakemake would; return what is said before and the stages that had a job."""
        said = requests.ask_for_stages(self.results, self.stages.values(), FileDigests.of_results(self.results))
        ran: list[str] = []
        for name, stage in self.stages.items():
            record = self.folder_of(name) / stage_runner.RECORD
            request = requests.request_file(self.results, requests.stage_request(stage))
            above = {other for other, its in self.stages.items() if its in stage.parents.values()}
            is_old = not record.exists() or request.stat().st_mtime_ns > record.stat().st_mtime_ns
            if is_old or above & set(ran):
                self._finished(self.begin(name))
                ran.append(name)
        shown = {name: stage for name, stage in self.stages.items() if name in run_folder.SHOWN}
        target = self.results / "default"
        target.mkdir(exist_ok=True)
        requests.ask_for_run(self.results, "default", shown, FileDigests.of_results(self.results))
        if requests.request_file(self.results, "default").stat().st_mtime or ran:
            folders = {name: self.folder_of(name) for name in shown}
            self._finished(fork(lambda: side_jobs.link_run(folders, target, Path("link.log")), self.terminal))
        return said, ran


@dataclass
class Servers:
    """The servers in a child, and where they answer: the judge, the rows."""

    child: Child
    urls: list[str]


def import_everything() -> None:
    """Import what any stage does, so that children have it, and read the code once."""
    for spec in SPECS.values():
        importlib.import_module(spec.run)
        code_digest.code_digest(spec.run)
    for name in ("lm_eval.models.huggingface", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)


def reply_in_this_process() -> None:
    """Let the merge's proof call for its reply: a new Python for it would be most of a merge's time."""
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if fresh_process_reply.__name__ not in command:
            return real(command, **options)
        folder, dtype, device = command[-3:]
        question = json.loads(options["input"])
        found = fresh_process_reply.greedy_reply(
            folder, dtype, device, question["input_ids"], question["max_new_tokens"]
        )
        return subprocess.CompletedProcess(command, 0, json.dumps(found) + "\n")

    subprocess.run = cast(Any, run)


def write_inputs(folder: Path) -> None:
    """Write the model, rows and a task into `folder`."""
    from project import write_rows
    from tiny import save_tiny_model

    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 40)
    write_rows(folder / "more.jsonl", 20, start=40)
    (folder / "task.yaml").write_text(TASK)
    questions = [{"question": f"Where is {n}?", "choices": ["Paris", "Order"], "right": n % 2} for n in range(6)]
    write_jsonl(folder / "questions.jsonl", questions)


def configuration(judge: str, rows: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Settings that ask for every stage, with every source of chance that training has."""
    train = {
        "epochs": 3, "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-3, "effective_batch_size": 6,
        "eval_samples": 4, "eval_times": 4, "samples": 1, "keep": "best", "compute_dtype": "float32",
    }  # fmt: skip
    return {
        "model": {"source": "model"},
        "data": {
            "sources": [{"path": "rows.jsonl"}, {"url": f"{rows}/more.jsonl?${{MY_SIGNED}}", "token_env": "MY_ROWS"}],
            "heldout": {"share": 0.2},
        },
        "lengths": {"max_seq_length": 128},
        "train": train,
        "evaluate": {
            "max_new_tokens": 8,
            "tasks": [{"path": "task.yaml"}],
            "judge": {"base_url": judge, "model": "judge"},
        },
        "export": {"gguf": "q8_0"},
        **changes,
    }


def is_page(path: Path) -> bool:
    """Whether a file is for reading, and tells times in its sentences."""
    return path.suffix in (".html", ".md", ".yaml")


def content(path: Path) -> object:
    """A file's digest, or what stands in it beside times."""
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        for name in OF_ATTEMPTS.get(path.name, ()):
            section, _, inner = name.rpartition(".")
            (found[section] if section else found).pop(inner, None)
        return timeless(found)
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return digest_file(path)


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """Where two contents differ, by path; of digests and values both are told."""
    if isinstance(one, dict) and isinstance(other, dict):
        return set().union(*(differences(one.get(n), other.get(n), f"{path}.{n}") for n in one.keys() | other.keys()))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return set().union(*(differences(a, b, f"{path}.{n}") for n, (a, b) in enumerate(zip(one, other, strict=True))))
    return set() if one == other else {f"{path} {str(one)[:80]} for {str(other)[:80]}"}


def timeless(value: Any) -> Any:
    """JSON without what no two runs have alike."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name not in VOLATILE}
    if isinstance(value, list):
        return [timeless(inner) for inner in value]
    # Sentences that tell of the memory that is free.
    return re.sub(r"[\d.,]+ GiB", "… GiB", value) if isinstance(value, str) else value


@contextlib.contextmanager
def workflow(folder: Path, **changes: Any) -> Iterator[Workflow]:
    """A Workflow whose processes are ended."""
    made = Workflow(folder, **changes)
    try:
        yield made
    finally:
        made.close()
