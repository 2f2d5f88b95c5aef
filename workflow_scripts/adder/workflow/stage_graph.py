"""Which stages a configuration needs, each under a key that is a pure function of settings and data.

Two runs that share settings up to a stage share its key, and with it its folder; a setting changed and changed back
finds its old folder. Importing this module is cheap: the workflow is parsed with it.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from adder.core.errors import UserError
from adder.core.files import digest_file, read_json
from adder.core.model_config import context_length
from adder.core.paths import local_files, resolve_path
from adder.core.secrets import refuse_secrets
from adder.evaluation.tasks.task_files import data_files, task_files
from adder.export.gguf import refuse_unsupported
from adder.workflow.settings import NAMED_TEMPLATES, EvaluationTask, Settings, Source

# What a stage reads of its parents (files, or folders with a slash): the early cut-off compares just these. The report
# reads everything of all of its parents.
READS: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {},
    "data": {},
    "format": {"data": ("rows.jsonl", "reading.json")},
    "tokenize": {
        "format": ("train.parquet", "heldout.parquet"),
        "model": ("model/",),
    },
    "lengths": {"tokenize": ("train.arrow",), "model": ("model/config.json",)},
    "train": {
        "lengths": ("packs.parquet",),
        "tokenize": ("train.arrow", "heldout.arrow", "tokenizer/"),
        "model": ("model/", "source.json"),
    },
    "merge": {
        "train": ("adapter/", "model/"),
        "model": ("model/", "source.json"),
        "tokenize": ("heldout.arrow", "tokenizer/", "tokenize.json"),
        "format": ("heldout.parquet",),
    },
    "evaluate": {
        "model": ("model/",),
        "tokenize": ("heldout.arrow", "tokenizer/", "tokenize.json"),
        "format": ("heldout.parquet",),
    },
    "task": {"model": ("model/",), "tokenize": ("tokenizer/", "tokenize.json")},
    "judge": {"evaluate_base": ("samples.jsonl",), "evaluate_tuned": ("samples.jsonl",)},
    "gguf": {"merge": ("model/",)},
}
# Stages that are long, or paid for, and so continue where they broke off; and what only a checkpoint of theirs has.
CONTINUED = {"train": "checkpoint-*/seal.json", "judge": "*.json"}


@dataclass(frozen=True)
class Stage:
    """One stage with its resolved settings; `parents` maps the name under which it reads a stage to that stage."""

    name: str
    settings: dict
    parents: dict[str, "Stage"] = field(default_factory=dict)
    # What stands for the settings in the key, where that is not the settings themselves (a file's digest for its path).
    identity: dict | None = None

    @property
    def key(self) -> str:
        """Twelve hex digits: a digest of the stage's name, its settings and its parents' keys."""
        parents = {name: parent.key for name, parent in self.parents.items()}
        identity = self.settings if self.identity is None else self.identity
        return hashlib.blake2b(canonical([self.name, identity, parents]).encode(), digest_size=6).hexdigest()

    @property
    def folder(self) -> str:
        """Path of the stage's folder below the results directory."""
        return f"stages/{self.name}/{self.key}"

    def family(self) -> dict[str, "Stage"]:
        """Return this stage and all above it, by folder."""
        found = {self.folder: self}
        for parent in self.parents.values():
            found |= parent.family()
        return found


def reads(stage: str, parent: str) -> tuple[str, ...]:
    """What `stage` reads of the parent that it knows by this name; an empty path stands for everything."""
    return ("",) if stage == "report" else READS[stage][parent]


def canonical(value: object) -> str:
    """JSON that is equal for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Digests:
    """Digests of local files, remembered by size and time stamp so that parsing stays instant with a 50 GB file."""

    def __init__(self, memory: Path):
        self.memory = memory
        try:
            self.known = json.loads(memory.read_text())
        except (OSError, ValueError):
            self.known = {}

    def of(self, path: Path) -> str:
        """Digest of one file, or of a directory's files by name."""
        if path.is_dir():
            inner = {str(p.relative_to(path)): self.of(p) for p in sorted(path.rglob("*")) if p.is_file()}
            return hashlib.blake2b(canonical(inner).encode(), digest_size=20).hexdigest()
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = self.known.get(str(path))
        if known and known[:2] == stamp:
            return known[2]
        self.known[str(path)] = [*stamp, digest_file(path)]
        self._remember()
        return self.known[str(path)][2]

    def _remember(self) -> None:
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        partial = self.memory.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self.known, sort_keys=True))
        partial.replace(self.memory)


def stages_of_run(run: str, settings: Settings, resolved: list[dict], root: Path, digests: Digests) -> dict[str, Stage]:
    """Return the stages of one run by the name under which the report knows them.

    `root` is the directory that relative paths in the settings start from. Raises UserError for missing files.
    """
    plain = settings.model_dump(mode="json")
    model = Stage("model", plain["model"], identity=_model_identity(settings, root, digests))
    heldout = plain["data"]["heldout"]
    data = Stage(
        "data",
        {
            "sources": plain["data"]["sources"],
            "heldout": {"sources": heldout["sources"]},
            "tests": plain["data"]["tests"],
        },
        identity=_data_identity(settings, root, digests),
    )
    split = {name: heldout[name] for name in ("share", "size", "group_by", "stratify_by")}
    format_ = Stage("format", {**plain["format"], "heldout": split}, {"data": data})
    template = plain["tokenize"]["chat_template"]
    if template and template not in NAMED_TEMPLATES:
        template = _file(template, "tokenize.chat_template", root, digests)
    tokenize = Stage(
        "tokenize",
        plain["tokenize"],
        {"format": format_, "model": model},
        identity={**plain["tokenize"], "chat_template": template},
    )
    max_examples = plain["train"].pop("max_examples")  # drawn before packing: training only sees the packs
    plain["train"]["reshuffle"] = plain["lengths"].pop("reshuffle")  # which is done as training goes
    lengths = Stage(
        "lengths",
        {**plain["lengths"], "effective_batch": settings.train.effective_batch_size, "max_examples": max_examples},
        {"tokenize": tokenize, "model": model},
    )
    train = Stage("train", plain["train"], {"lengths": lengths, "tokenize": tokenize, "model": model})
    merging = {**plain["merge"], "method": settings.train.method}
    merge = Stage("merge", merging, {"train": train, "model": model, "tokenize": tokenize, "format": format_})
    tasks, judge = plain["evaluate"].pop("tasks"), plain["evaluate"].pop("judge")
    base = Stage("evaluate", plain["evaluate"], {"model": model, "tokenize": tokenize, "format": format_})
    tuned = Stage("evaluate", plain["evaluate"], {"model": merge, "tokenize": tokenize, "format": format_})
    above = {
        "model": model,
        "data": data,
        "format": format_,
        "tokenize": tokenize,
        "lengths": lengths,
        "train": train,
        "merge": merge,
        "evaluate_base": base,
        "evaluate_tuned": tuned,
    }
    for number, task in enumerate(tasks):
        del task["max_drop"]  # the report judges by it: another limit runs no task again
        identity = _task_identity(settings.evaluate.tasks[number], f"evaluate.tasks.{number}", root, digests)
        for who, folder in (("base", model), ("tuned", merge)):
            parents = {"model": folder, "tokenize": tokenize}
            above[f"task_{who}_{number}"] = Stage("task", task, parents, identity=identity)
    if judge:
        refuse_secrets(judge["base_url"], "evaluate.judge.base_url")
        above["judge"] = Stage("judge", judge, {"evaluate_base": base, "evaluate_tuned": tuned})
    report = Stage(
        "report",
        {
            **plain["report"],
            "run": run,
            "tasks": [{"task": task_name(task), "max_drop": task.max_drop} for task in settings.evaluate.tasks],
            # Settings of the machine, and of what is done with the model later, are none of the run's.
            "resolved": [row for row in resolved if not row["key"].startswith(("runtime.", "export."))],
            "stages": {name: stage.key for name, stage in above.items()},
        },
        above,
    )
    asked = {"gguf": Stage("gguf", {"type": settings.export.gguf}, {"merge": merge})}
    return {**above, "report": report, **(asked if settings.export.gguf != "off" else {})}


def refuse_impossible(run: str, settings: Settings, stages: dict[str, Stage], results: Path, root: Path) -> None:
    """Raise UserError for what this model can't do, as far as its config is there before any job runs.

    That is a max_seq_length above its context, and a GGUF file of an architecture that can't be written.
    """
    folders = (resolve_path(settings.model.source, root), results / stages["model"].folder / "model")
    known = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if known is None:
        return
    context, wanted = context_length(known), settings.lengths.max_seq_length
    if context and wanted != "auto" and wanted > context:
        raise UserError(f"lengths.max_seq_length (run {run}): {wanted} is above the model's context, {context} tokens")
    if settings.export.gguf != "off":
        refuse_unsupported(read_json(known / "config.json"))


def _model_identity(settings: Settings, root: Path, digests: Digests) -> dict:
    source = settings.model.source
    identity = settings.model.model_dump(mode="json")
    path = resolve_path(source, root)
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".gguf") or path.exists()
    if source.startswith("wheel:") or not looks_local:
        return identity
    if not path.exists():
        raise UserError(f"model.source: {source!r} is neither there ({path}) nor a hub id (owner/name)")
    return {**identity, "source": digests.of(path)}


def _data_identity(settings: Settings, root: Path, digests: Digests) -> dict:
    groups = {
        "sources": settings.data.sources,
        "heldout": settings.data.heldout.sources or [],
        "tests": settings.data.tests,
    }
    where = {"sources": "data.sources", "heldout": "data.heldout.sources", "tests": "data.tests"}
    return {
        name: [_source_identity(source, f"{where[name]}.{i}", root, digests) for i, source in enumerate(sources)]
        for name, sources in groups.items()
    }


def _source_identity(source: Source, where: str, root: Path, digests: Digests) -> dict:
    """A local file counts by its name and content; a URL or a hub data set by its settings."""
    identity = source.model_dump(mode="json")
    if source.path is not None:
        files = local_files(source.path, f"{where}.path", root)
        identity["path"] = _named(files, digests)
    if source.url is not None:
        refuse_secrets(source.url, f"{where}.url")
    if source.convert is not None:
        identity["convert"] = _file(source.convert, f"{where}.convert", root, digests)
    return identity


def task_name(task: EvaluationTask) -> str:
    """What a task is called: lm-eval's name, or its file's."""
    return task.name or Path(task.path).stem


def _task_identity(task: EvaluationTask, where: str, root: Path, digests: Digests) -> dict:
    """A task's own files count by their names and content."""
    identity = task.model_dump(mode="json", exclude={"max_drop"})
    if task.path is not None:
        _file(task.path, f"{where}.path", root, digests)
    data = {split: _named(data_files(identity, split, root), digests) for split in task.data or {}}
    files = _named(task_files(identity, root), digests)
    return {**identity, "path": task.path and Path(task.path).name, "data": data, "files": files}


def _named(files: list[Path], digests: Digests) -> list[list[str]]:
    return [[path.name, digests.of(path)] for path in files]


def _file(name: str, where: str, root: Path, digests: Digests) -> str:
    path = resolve_path(name, root)
    if not path.is_file():
        raise UserError(f"{where}: there is no file {name!r} (looked for {path})")
    return digests.of(path)
