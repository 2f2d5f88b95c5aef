"""Which local files an lm-eval task reads: what its stage's key is made of. Light: the workflow is parsed with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from adder.core.errors import UserError
from adder.core.paths import local_files, resolve_path

CONFIG = "{config}"  # in a path of `data`: the name of the task's own part of its data set, for groups such as mmlu
FOLDER = "folder of the data"  # a key that no task has
TaskConfig = dict[str, Any]  # a task's YAML


class TaskEntry(Protocol):
    """What these functions read of an entry of `evaluate.tasks`."""

    @property
    def name(self) -> str | None:
        """One of lm-eval's tasks."""
        ...

    @property
    def path(self) -> str | None:
        """Or a YAML of the user's."""
        ...

    @property
    def data(self) -> Mapping[str, str] | None:
        """Local files by split."""
        ...


LOADERS = ("json", "csv", "parquet", "arrow", "text")  # values of dataset_path that name a kind of file


def task_files(task: TaskEntry, root: Path) -> list[Path]:
    """The local files of one entry of `evaluate.tasks`, sorted.

    That is its YAML with what that includes, calls and reads, and the files of `data`. Relative paths of the settings
    start at `root`. Raises UserError for a file that isn't there.
    """
    files = {file for split in task.data or {} for file in data_files(task, split, root)}
    if task.path:
        _, own = read_task(resolve_path(task.path, root))
        files |= own
    return sorted(files)


def data_files(task: TaskEntry, split: str, root: Path, config: str = "*") -> list[Path]:
    """The files, absolute, that stand in for one split of the data set; `config` takes the place of `{config}`."""
    pattern = (task.data or {})[split].replace(CONFIG, config)
    return [path.resolve() for path in local_files(pattern, f"evaluate.tasks ({name_of(task)}).data.{split}", root)]


def name_of(task: TaskEntry) -> str:
    """What an entry of `evaluate.tasks` is called in messages: lm-eval's name, or the path of its YAML."""
    return task.name or task.path or ""


def read_task(path: Path) -> tuple[TaskConfig, set[Path]]:
    """The settings in a task's YAML, with what it includes and the paths of its data made absolute; and its files.

    Functions (`!function utils.score`) are left as text; a module of theirs that lies beside the YAML is among the
    files. Those of a group are all YAML files in its folder and below, with theirs. Raises UserError for a file that
    isn't there or is no YAML dictionary.
    """
    config, files = _read(path)
    if isinstance(config.get("task"), list):
        for member in path.parent.rglob("*.yaml"):
            more, its_files = _read(member)
            files |= its_files | _make_absolute(more, member)
    return config, files | _make_absolute(config, path)


def _read(path: Path) -> tuple[TaskConfig, set[Path]]:
    """One YAML file with what it includes; FOLDER says where the paths of its data start."""
    functions: list[str] = []
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _loader(functions))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluate.tasks: the task file {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"evaluate.tasks: the task file {path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"evaluate.tasks: the task file {path} holds {type(config).__name__}, not a dictionary")
    helpers = {path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in functions}
    files = {path, *(helper.resolve() for helper in helpers if helper.is_file())}
    if "dataset_kwargs" in config or "dataset_path" in config:
        config[FOLDER] = path.parent
    included: TaskConfig = {}
    names = config.pop("include", [])
    for name in [names] if isinstance(names, str) else names:
        other = (path.parent / name).resolve()
        if not other.is_file():
            raise UserError(f"evaluate.tasks: {path} includes {name!r}, which is not there (looked for {other})")
        more, its_files = _read(other)
        included |= more
        files |= its_files
    return included | config, files


def _loader(functions: list[str]) -> type[yaml.SafeLoader]:
    """A loader that takes `!function name` for the name, and notes it."""

    class Loader(yaml.SafeLoader):
        pass

    def note(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        functions.append(str(loader.construct_scalar(node)))
        return functions[-1]

    Loader.add_constructor("!function", note)
    return Loader


def _make_absolute(config: TaskConfig, path: Path) -> set[Path]:
    """Make the local paths of a task's data absolute, whatever directory a run starts in; return their files.

    What a data set of the hub's calls `data_files` are files of its repository, and left alone.
    """
    folder = config.pop(FOLDER, path.parent)
    own, arguments = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if isinstance(own, str) and own not in LOADERS and (folder / own).exists():
        found = (folder / own).resolve()
        config["dataset_path"] = str(found)
        return {file for file in [found, *found.rglob("*")] if file.is_file()}
    if own not in LOADERS or "data_files" not in arguments:
        return set()
    files: set[Path] = set()

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: absolute(inner) for split, inner in value.items()}
        if isinstance(value, list):
            return [absolute(inner) for inner in value]
        if "://" in value:
            return value
        found = [file.resolve() for file in local_files(value, f"{path}: data_files", folder)]
        files.update(found)
        return str(found[0]) if len(found) == 1 else list(map(str, found))

    config["dataset_kwargs"] = {**arguments, "data_files": absolute(arguments["data_files"])}
    return files
