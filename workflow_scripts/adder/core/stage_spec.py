"""What a stage is, declared once: the workflow's graph, rules, cache and documentation are derived from it.

A package declares its stage in `stage.py`, which is light to import, since the workflow is parsed with it; the work is
in the module that `StageSpec.run` names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from adder.core import hardware
from adder.core.file_digests import FileDigests
from adder.core.progress import Progress
from adder.core.section import Auto, Section

CLUSTER_CORES = 8  # that a cluster is asked for by a stage that uses all cores it is given


class Runtime(Section):
    """How to use this machine. Only `upgrades` can be a reason to compute anything again."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    gpus: Auto | Annotated[int, Field(ge=1)] = "auto"
    """GPUs that a training uses, each with a process of its own; `auto` takes all that it sees. The packs of an
    optimizer step, and with them the loss curve, are the same for any number."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several GPUs hold a model: each all of it (`ddp`) or each a part of every weight (`fsdp`); `auto` shards what
    doesn't fit in one."""
    threads: Auto | Annotated[int, Field(ge=1)] = "auto"
    """CPU threads of a stage; `auto` takes all cores that the process may use."""
    results: str = "results"
    """Directory of everything that is written."""
    restore: bool = True
    """Put a finished result into place where the same work was done before, instead of doing it again."""
    upgrades: Literal["say", "rerun"] = "say"
    """What to do where finished stages were made with other versions of the libraries that can change numbers (torch,
    transformers, peft, trl and others) than those installed: say so at the start, or run these stages anew."""
    checkpoints: int = Field(default=10, ge=0)
    """How many checkpoints a training run writes, evenly spread; a killed run continues from the last one."""
    save_total_limit: int = Field(default=2, ge=2)
    """How many of them are kept at a time, the one before the newest among them."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=["tensorboard"])
    """Where curves go while training, besides the report. TensorBoard's files are in `results/tensorboard/`; the others
    go by their own variables (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`). None can fail a training."""


@dataclass(frozen=True)
class Earlier:
    """What earlier runs of a stage left, for parts to be taken over that would come out the same.

    folders: of their finished results, newest first; one may be gone by the time it is looked into. code: digest of
    what a module ("adder.tokenization.labels") and all that it imports do.
    """

    folders: tuple[Path, ...]
    code: Callable[[str], str]


@dataclass(frozen=True)
class Context:
    """What a stage is run with, apart from what decides its result: the machine and the people who watch.

    checkpoints: a folder that outlives a kill, of just this work, for stages that are continued; None for the others.
    results: the directory of all results, for what is beside the stages, such as downloads and trackers' files.
    earlier: None where nothing is to be kept for later runs either.
    """

    progress: Progress
    runtime: Runtime = field(default_factory=Runtime)
    results: Path = Path("results")
    checkpoints: Path | None = None
    earlier: Earlier | None = None

    @cached_property
    def device(self) -> str:
        """Where to compute, "cuda" or "cpu"; says why not on a GPU that is here, but can't be used.

        Raises UserError where a GPU is asked for and none can be used.
        """
        device = hardware.device(self.runtime.device)
        if device == "cpu" and self.runtime.device == "auto" and (why := hardware.why_on_cpu()):
            self.progress.note(f"the CPU computes: {why}")
        return device

    @cached_property
    def threads(self) -> int:
        """CPU threads to compute with."""
        return hardware.threads(self.runtime.threads)


@dataclass(frozen=True)
class NoInputs:
    """The inputs of a stage that reads no other."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory that a stage asks a cluster for: `base_mb`, and `bytes_per_parameter` of the base model."""

    base_mb: int
    bytes_per_parameter: float = 0.0

    def megabytes(self, parameter_count: int, processes: int = 1) -> int:
        """MB to ask for, given the base model's parameter count and how many `processes` load it."""
        return self.base_mb + round(self.bytes_per_parameter * parameter_count * processes / 1e6)


def figures(found: Mapping[str, Any]) -> str:
    """A stage's summary as people may read it where nothing better is declared: its numbers and words by name."""
    shown = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str | bool) else f'{value:,.6g}'}"
        for name, value in shown.items()
    )


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """The declaration of a stage.

    name: the stage's, and that of its folder below `results/stages/`.
    rule: name of its Snakemake rule.
    run: module whose function `run(settings, inputs, out, context)` does the work, such as "adder.training.run".
    settings: what decides its result; its fields make the stage's key.
    section: where in the settings these fields are, such as "train" or "evaluate.judge"; a list makes a stage an entry,
        and None makes none.
    takes: fields that are elsewhere in the settings: {field: "train.effective_batch_size"}.
    reads: {name of a parent: files, or folders with a slash, that are read of it}. The early cut-off compares just
        these. "" stands for everything.
    variants: {variant: {name of a parent: stage that is read under this name}}, for a stage that is run on several
        models: evaluate is run as `evaluate_base` and `evaluate_tuned`.
    wanted: whether these settings ask for the stage at all.
    identity: what stands for the settings in the key, where these name files of the user's: (settings, path of the
        settings, digests) to JSON. Raises UserError for files that aren't there.
    refuse: raises UserError for settings that this base model (its directory) can't do, before any job runs.
    continued: pattern of what a checkpoint leaves, for a stage that continues where it broke off.
    message: what people read when it starts.
    result: what people read when it has finished: one sentence without a full stop, of its summary.
    shows: what the report reads of it: {name: file}.
    priority: a stage of a higher one goes first where several could.
    local: runs where Snakemake runs, such as what needs the network.
    gpu, threads (None: all cores), minutes, memory: what it asks a cluster for; several_gpus: as many as
        runtime.gpus says.
    """

    name: str
    rule: str
    run: str
    settings: type[Section]
    message: str
    reads: Mapping[str, tuple[str, ...]]
    section: str | None = None
    takes: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    wanted: Callable[[Any], bool] = lambda settings: True
    identity: Callable[[Any, str, FileDigests], Any] | None = None
    refuse: Callable[[Any, Path], None] | None = None
    continued: str | None = None
    result: Callable[[Mapping[str, Any]], str] = figures
    shows: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    local: bool = False
    gpu: bool = False
    several_gpus: bool = False
    threads: int | None = 1
    minutes: int = 60
    memory: Memory = field(default_factory=lambda: Memory(base_mb=2000))

    def cores(self, runtime: Runtime) -> int:
        """CPUs to ask a cluster for."""
        if self.threads is not None:
            return self.threads
        return CLUSTER_CORES if runtime.threads == "auto" else runtime.threads

    def gpus(self, runtime: Runtime) -> int:
        """GPUs to ask a cluster for."""
        if not self.gpu or runtime.device == "cpu":
            return 0
        return runtime.gpus if self.several_gpus and runtime.gpus != "auto" else 1

    def megabytes(self, runtime: Runtime, parameter_count: int) -> int:
        """MB of main memory to ask a cluster for: each GPU has a process, which first loads the model."""
        return self.memory.megabytes(parameter_count, max(1, self.gpus(runtime)))
