"""Which stages a configuration needs, each under a key that is a pure function of settings and data.

Two runs that share settings up to a stage share its key, and with it its folder; a setting changed and changed back
finds its old folder. Importing this module is cheap: the workflow is parsed with it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from adder.core.errors import UserError
from adder.core.file_digests import FileDigests, canonical
from adder.core.files import read_json
from adder.core.paths import resolve_path
from adder.core.section import Section
from adder.core.stage_spec import StageSpec
from adder.data.checkpoints.hub_config import folder_with_config
from adder.evaluation.tasks.stage import EvaluationTask
from adder.report.stage import REPORT, ReportSettings, ResolvedSetting, TaskLimit
from adder.workflow.library_versions import installed_versions
from adder.workflow.settings import Rows, Settings, load, resolved
from adder.workflow.stages import SPECS


@dataclass(frozen=True)
class Stage:
    """One stage with its resolved settings; `parents` maps the name under which it reads a stage to that stage.

    identity: JSON that stands for the settings in the key: the settings themselves, or digests for files they name.
    versions: of the libraries, where these are part of the key (runtime.upgrades: rerun).
    """

    spec: StageSpec
    settings: Section
    identity: Any
    parents: dict[str, "Stage"] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stage's name, which it shares with stages of other runs."""
        return self.spec.name

    @cached_property
    def key(self) -> str:
        """Twelve hex digits: a digest of the stage's name, its settings and its parents' keys."""
        parents = {name: parent.key for name, parent in self.parents.items()}
        parts = [canonical(self.name), self._identity_text, canonical(parents)]
        parts += [canonical(self.versions)] if self.versions else []
        return hashlib.blake2b(f"[{','.join(parts)}]".encode(), digest_size=6).hexdigest()

    @cached_property
    def _identity_text(self) -> str:
        return canonical(self.identity)

    @cached_property
    def folder(self) -> str:
        """Path of the stage's folder below the results directory."""
        return f"stages/{self.name}/{self.key}"

    @cached_property
    def ancestors(self) -> frozenset[str]:
        """The folders of all stages above it."""
        parents = self.parents.values()
        return frozenset(parent.folder for parent in parents).union(*(parent.ancestors for parent in parents))

    def family(self) -> dict[str, "Stage"]:
        """Return this stage and all above it, by folder."""
        found: dict[str, Stage] = {self.folder: self}
        for parent in self.parents.values():
            found |= parent.family()
        return found

    def parameters(self) -> str:
        """What a job is told, as canonical JSON, in which the order of the YAML's keys has no part."""
        identity, versions = self._identity_text, canonical(self.versions)
        # Most settings stand for themselves, and are long where they list those of a run.
        settings = canonical(self.settings.model_dump(mode="json")) if self.spec.identity else identity
        return f'{{"identity":{identity},"settings":{settings},"versions":{versions}}}'


def nearest(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Those of the stages that no other of them is made from: where they are made, the others are."""
    above = frozenset[str]().union(*(stage.ancestors for stage in stages.values()))
    return {name: stage for name, stage in stages.items() if stage.folder not in above}


def reads(spec: StageSpec, parent: str) -> tuple[str, ...]:
    """What a stage reads of the parent that it knows by this name; an empty path stands for everything."""
    return ("",) if spec is REPORT else spec.reads[parent]


class Run(NamedTuple):
    """A run of a configuration: its settings, and its stages by the name under which the report knows them."""

    settings: Settings
    stages: dict[str, Stage]


def runs_of(config: dict[str, Any], say: Callable[[str], object] | None = None) -> dict[str, Run]:
    """The runs of a configuration by name; `say` is told what takes long.

    Raises UserError for mistakes, missing files, secrets in addresses and what the model can't do.
    """
    loaded = load(config)
    results = Path(next(iter(loaded.values())).runtime.results)
    digests = FileDigests.of_results(results, say)
    runs: dict[str, Run] = {}
    known, rows, models, tried = Known(), Rows(), dict[str, Path | None](), set[str]()
    for run, settings in loaded.items():
        stages = stages_of_run(run, settings, resolved(settings, config, run, rows), digests, known)
        fetched = stages["model"].folder
        if fetched not in models:
            models[fetched] = known_model(settings, stages, results, Path.cwd())
        refuse_impossible(run, [stage for stage in stages.values() if stage.folder not in tried], models[fetched])
        tried.update(stage.folder for stage in stages.values())
        runs[run] = Run(settings, stages)
    return runs


class Prepared(NamedTuple):
    """What stages of equal settings have in common: see Stage."""

    settings: Section
    identity: Any
    versions: dict[str, str]


@dataclass
class Known:
    """What was made for other runs of the same configuration, by the objects that it is made of; those outlive it.

    settings: None where these ask for no stage.
    """

    settings: dict[tuple[object, ...], Prepared | None] = field(default_factory=dict)
    stages: dict[tuple[object, ...], Stage] = field(default_factory=dict)


def stages_of_run(
    run: str, settings: Settings, resolved: list[ResolvedSetting], digests: FileDigests, known: Known | None = None
) -> dict[str, Stage]:
    """Return the stages of one run by the name under which the report knows them, parents before children.

    known: of other runs of the same configuration; stages that this run shares with them are the same objects.
    Raises UserError for missing files and for secrets in addresses.
    """
    known = known or Known()
    stages: dict[str, Stage] = {}
    for spec in SPECS.values():
        if spec is not REPORT:
            stages |= dict(_stages_of(spec, settings, stages, digests, known))
    shown = {name: stage for name, stage in stages.items() if stage.spec.section != "export"}
    report = ReportSettings.model_construct(
        **dict(settings.report),
        run=run,
        tasks=[TaskLimit(task=task_name(task), max_drop=task.max_drop) for task in settings.evaluate.tasks],
        # Settings of the machine, and of what is done with the model later, are none of the run's.
        resolved=[row for row in resolved if not row.key.startswith(("runtime.", "export."))],
        stages={name: stage.key for name, stage in shown.items()},
        shows={name: dict(stage.spec.shows) for name, stage in shown.items()},
    )
    return stages | {"report": Stage(REPORT, report, report.model_dump(mode="json"), shown)}


def _stages_of(
    spec: StageSpec, settings: Settings, above: dict[str, Stage], digests: FileDigests, known: Known
) -> Iterator[tuple[str, Stage]]:
    """The stages that one declaration stands for in a run: none, one, or one an entry and model."""
    for suffix, where, entry in _entries(spec, settings):
        own = {name: getattr(entry, name) for name in spec.settings.model_fields if name not in spec.takes}
        taken = {name: _at(settings, path) for name, path in spec.takes.items()}
        same = (spec.name, where, id(entry), *map(_same, taken.values()))
        if same not in known.settings:
            # Validated already; `model_construct` keeps sections that are inside.
            stage_settings = spec.settings.model_construct(**own, **taken)
            known.settings[same] = _prepared(spec, stage_settings, where, settings, digests)
        prepared = known.settings[same]
        if prepared is None:
            continue
        for variant, models in (spec.variants or {"": {}}).items():
            parents = {parent: above[models.get(parent, parent)] for parent in spec.reads}
            same_parents = (*same, variant, *map(id, parents.values()))
            if same_parents not in known.stages:
                known.stages[same_parents] = Stage(
                    spec, prepared.settings, prepared.identity, parents, prepared.versions
                )
            yield "_".join(filter(None, (spec.name, variant, suffix))), known.stages[same_parents]


def _prepared(
    spec: StageSpec, stage_settings: Section, where: str, settings: Settings, digests: FileDigests
) -> Prepared | None:
    if not spec.wanted(stage_settings):
        return None
    identity = (
        spec.identity(stage_settings, where, digests) if spec.identity else stage_settings.model_dump(mode="json")
    )
    return Prepared(stage_settings, identity, installed_versions(spec) if settings.runtime.upgrades == "rerun" else {})


def _same(value: object) -> object:
    """What is equal for values of which the same follows: a plain value with its type, or the very object."""
    return (type(value), value) if isinstance(value, str | int | float | None) else id(value)


def _entries(spec: StageSpec, settings: Settings) -> Iterator[tuple[str, str, Section]]:
    """(suffix of the stage's name, path in the settings, section) of each stage that the settings ask for."""
    path = spec.section or ""
    found = _at(settings, path)
    if isinstance(found, list):
        yield from ((str(number), f"{path}.{number}", entry) for number, entry in enumerate(found))
    elif found is not None:
        yield "", path, found


def _at(settings: Settings, path: str) -> Any:
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def refuse_impossible(run: str, stages: Iterable[Stage], model: Path | None) -> None:
    """Raise UserError for what this model (its known_model) can't do, as far as its files are there before any job."""
    if model is None:
        return
    for stage in stages:
        if stage.spec.refuse is not None:
            try:
                stage.spec.refuse(stage.settings, model)
            except UserError as error:
                raise UserError(f"{error} (run {run})") from None


def known_model(settings: Settings, stages: dict[str, Stage], results: Path, root: Path) -> Path | None:
    """A folder with the base model's config.json, if there is one before any job runs.

    That is a local model's, one that was fetched, or, of a hub id, that file alone.
    """
    own = resolve_path(settings.model.source, root)
    folders = (own, results / stages["model"].folder / "model")
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    return folder_with_config(settings.model) if found is None and not own.exists() else found


def parameter_count(stages: dict[str, Stage], results: Path) -> int | None:
    """Parameter count of a run's base model, once that was fetched; None too where its record is damaged, whose stage
    is then made anew.
    """
    try:
        return int(read_json(results / stages["model"].folder / "source.json")["parameters"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def task_name(task: EvaluationTask) -> str:
    """What a task is called: lm-eval's name, or its file's."""
    return task.name or Path(task.path or "").stem
