"""Find a task of lm-eval's or of the user's, with its data in place: fetched, or local files."""

import difflib
import functools
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import GROUP_FIELD_NAMES
from lm_eval.tasks._index import Kind, TaskIndex

from adder.core.errors import UserError
from adder.core.paths import resolve_path
from adder.evaluation.tasks.stage import TaskSettings
from adder.evaluation.tasks.task_files import TaskConfig, data_files, name_of, read_task

TASKS = Path(str(lm_eval.tasks.__file__)).parent
Leaves = dict[str, TaskConfig]  # single tasks by name, each with what a group sets anew
NAMES = re.compile(r"^[\"']?(?:task|group)[\"']?:\s*[\"']?([\w.-]+)", re.MULTILINE)
FEWSHOT_SEED = 1234  # lm-eval's own
LOADER_OF = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip


def load_tasks(settings: TaskSettings, root: Path) -> dict[str, Task]:
    """The tasks by name, one unless a group is meant, with their data. Relative paths in the settings start at `root`.

    Raises UserError when there is no such task, it can't be read, or its data or packages aren't there.
    """
    name = name_of(settings)
    try:
        tasks = _load_own(settings, root) if settings.path else _load_named(settings, root)
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluate.tasks: {name} needs the Python package {error.name!r}, which is not installed; lm-eval's "
            "extras, such as lm-eval[ifeval], have what its tasks need"
        ) from None
    except OSError as error:  # of datasets: no network, no such data set, a gated one
        raise UserError(
            f"evaluate.tasks: what {name} needs can't be fetched: {_first_line(error)}. Its data can be given as local "
            f"files, `data: {{SPLIT: FILE}}`, with {_splits_wanted(settings, root)}"
        ) from None
    except (DatasetsError, StopIteration) as error:
        why = "a file is empty" if isinstance(error, StopIteration) else _first_line(error.__cause__ or error)
        raise UserError(f"evaluate.tasks: the data of {name} can't be read: {why}") from None
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError, jinja2.TemplateError) as error:
        raise UserError(
            f"evaluate.tasks: {name} can't be made ready: {type(error).__name__}: {_first_line(error)}. "
            f"{'Do the columns of `data` have the names that the task reads? ' if settings.data else ''}"
            f"It wants {_splits_wanted(settings, root)}"
        ) from None
    for task in tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    _refuse_missing_nltk_data(name)
    return tasks


@functools.cache
def task_texts() -> dict[Path, str]:
    """The text of each of lm-eval's 14,000 task files, by path below TASKS."""
    return {path.relative_to(TASKS): path.read_text(encoding="utf-8") for path in TASKS.rglob("*yaml")}


@functools.cache
def built_in(name: str) -> tuple[TaskManager, Leaves]:
    """lm-eval's tasks as far as `name` needs them, and `leaves` of it. Raises UserError where there is no such task.

    Understanding all task files takes lm-eval some ten seconds, looking for a word in them one.
    """
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    folders = sorted({path.parts[0] for path, text in task_texts().items() if word.search(text)})
    manager = TaskManager(include_defaults=False, include_path=[TASKS / folder for folder in folders])
    if name not in manager.task_index:
        names = {found for text in task_texts().values() for found in NAMES.findall(text)}
        near = difflib.get_close_matches(name, sorted(names), n=5, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"evaluate.tasks: lm-eval {version('lm_eval')} has no task {name!r}{hint}")
    try:
        return manager, leaves(manager, name)
    except KeyError:  # a group of tasks from everywhere
        manager = TaskManager()
    try:
        return manager, leaves(manager, name)
    except KeyError as error:
        raise UserError(f"evaluate.tasks: {name} holds a task without a name of its own ({error})") from None


def _load_named(settings: TaskSettings, root: Path) -> dict[str, Task]:
    manager, single = built_in(name_of(settings))
    return _load_members(manager, single, settings, root)


def _load_own(settings: TaskSettings, root: Path) -> dict[str, Task]:
    path = resolve_path(name_of(settings), root)
    plain, _ = read_task(path)
    kind = "group" if isinstance(plain.get("task"), list) else "task"
    if not isinstance(plain.get(kind), str):
        raise UserError(f"evaluate.tasks: {path} gives its {kind} no name: write `{kind}: {path.stem}`")
    if kind == "task":
        manager = TaskManager(include_defaults=False)
        entry = TaskIndex.entry_from_path(path)
        assert entry is not None  # it has a name
        manager.task_index[plain["task"]] = entry
        return _load_members(manager, {plain["task"]: {}}, settings, root)
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    try:
        members = leaves(manager, plain["group"])
    except KeyError:  # members that aren't beside it are lm-eval's
        manager = TaskManager(include_path=str(path.parent))
        members = leaves(manager, plain["group"])
    return _load_members(manager, members, settings, root)


def leaves(manager: TaskManager, name: str) -> Leaves:
    """Each single task that a name stands for, itself or the members of a group or tag, with what a group sets anew."""
    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:
        return {leaf: {} for leaf in sorted(entry.tags)}
    if entry.kind is not Kind.GROUP:
        return {name: {}}
    return _members(manager, entry.cfg or {})


def _members(manager: TaskManager, group: Mapping[str, Any]) -> Leaves:
    """`leaves` of a group's own settings; its members are names, or settings with a name, or groups in their turn."""
    shared = {key: value for key, value in group.items() if key not in GROUP_FIELD_NAMES}
    found = {}
    for member in group["task"]:
        own = {"task": member} if isinstance(member, str) else member
        if isinstance(own.get("task"), list):
            inner = _members(manager, own)
        else:
            anew = {key: value for key, value in own.items() if key not in ("task", "group")}
            name = str(own.get("task", own.get("group")))
            inner = {leaf: {**anew, **deeper} for leaf, deeper in leaves(manager, name).items()}
        found |= {leaf: {**shared, **deeper} for leaf, deeper in inner.items()}
    return found


def _own_settings(manager: TaskManager, name: str) -> TaskConfig:
    path = manager.task_index[name].yaml_path
    assert path is not None  # a single task has a file
    return read_task(path)[0]


def _load_members(manager: TaskManager, single: Leaves, settings: TaskSettings, root: Path) -> dict[str, Task]:
    """Single tasks with their data in place: from `data`, or with the local paths in their YAML made absolute."""
    members = []
    for leaf, anew in single.items():
        own = {**_own_settings(manager, leaf), **anew}
        if own.get("unsafe_code"):
            raise UserError(f"evaluate.tasks: {leaf} runs code that the model writes on this machine; that isn't done")
        data = {key: own[key] for key in ("dataset_path", "dataset_kwargs") if key in own}
        data = local_data(settings, own, root) if settings.data else data
        fewshot = {} if settings.num_fewshot is None else {"num_fewshot": settings.num_fewshot}
        members.append({"task": leaf, **anew, **data, **fewshot})
    # A group of our own is how lm-eval lets settings of its tasks be replaced.
    return manager.load([{"group": "as set", "task": members}])["tasks"]


def local_data(settings: TaskSettings, own: TaskConfig, root: Path) -> TaskConfig:
    """What replaces a task's own settings (`own`) so that it reads the files of `data`.

    Splits that aren't given, and that nothing needs, are taken out. Raises UserError where one is missing.
    """
    given, name = settings.data or {}, own["task"]
    wanted = wanted_splits(own, settings.num_fewshot)
    missing = [split for split in wanted if split not in given]
    if missing:
        hint = "; or set num_fewshot to 0" if missing[0] != next(iter(wanted)) else ""
        raise UserError(
            f"evaluate.tasks ({name}).data: no file for its split {missing[0]!r}, {wanted[missing[0]]}; given: "
            f"{', '.join(sorted(given))}{hint}"
        )
    config = str(own.get("dataset_name") or "")
    files = {split: data_files(settings, split, root, config) for split in given}
    suffixes = {file.suffix for paths in files.values() for file in paths}
    loaders = {LOADER_OF.get(suffix) for suffix in suffixes}
    if len(loaders) != 1 or None in loaders:
        raise UserError(
            f"evaluate.tasks ({name}).data: its files end in {', '.join(sorted(suffixes))}; allowed are "
            f"{', '.join(LOADER_OF)}, and one kind for all splits"
        )
    kwargs: dict[str, Any] = {"data_files": {split: list(map(str, paths)) for split, paths in files.items()}}
    if ".tsv" in suffixes:
        kwargs["sep"] = "\t"
    absent: TaskConfig = {
        key: None
        for key in ("training_split", "validation_split", "test_split", "fewshot_split")
        if own.get(key) not in given
    }
    if (own.get("fewshot_config") or {}).get("split") not in (None, *given):
        absent["fewshot_config"] = {key: value for key, value in own["fewshot_config"].items() if key != "split"}
    return {"dataset_path": loaders.pop(), "dataset_name": None, "dataset_kwargs": kwargs, **absent}


def wanted_splits(own: TaskConfig, num_fewshot: int | None) -> dict[str, str]:
    """The splits that a task can't do without, the one with its questions first, each with what it is for."""
    splits = {str(own.get("test_split") or own.get("validation_split")): "which holds its questions"}
    examples = own.get("num_fewshot") if num_fewshot is None else num_fewshot
    fewshot = own.get("fewshot_config") or {}
    source = fewshot.get("split") or own.get("fewshot_split") or own.get("training_split")
    if examples and source and "samples" not in fewshot:
        splits.setdefault(source, f"from which come the {examples} examples in its prompt")
    return splits


def _splits_wanted(settings: TaskSettings, root: Path) -> str:
    """The splits of a task in words, for messages; a group's are those of its first member."""
    if settings.path:
        own, _ = read_task(resolve_path(name_of(settings), root))
    else:
        manager, single = built_in(settings.name)
        name, anew = next(iter(single.items()))
        own = {**_own_settings(manager, name), **anew}
    found = [f"{split!r}, {what}" for split, what in wanted_splits(own, settings.num_fewshot).items()]
    source = " ".join(str(own[key]) for key in ("dataset_path", "dataset_name") if own.get(key))
    return f"the splits of {source or 'its data set'}: {'; '.join(found)}"


def _refuse_missing_nltk_data(name: str) -> None:
    """ifeval counts sentences by NLTK's rules, which are a download of their own: without them it fails at the end."""
    if "lm_eval.tasks.ifeval.instructions_util" not in sys.modules:
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise UserError(
            f"evaluate.tasks: {name} needs NLTK's data 'punkt_tab', which is neither here nor to be fetched. Where "
            "there is a network run `python -m nltk.downloader punkt_tab`, and copy ~/nltk_data if need be"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
