"""Paths and URLs as the configuration names them. Light to import: the workflow is parsed with it."""

import glob
from pathlib import Path

from adder.core.errors import UserError


def local_files(pattern: str, where: str, root: Path = Path()) -> list[Path]:
    """The files, and folders that `datasets` saved, that a path or pattern stands for, sorted.

    A relative one starts at `root`. Raises UserError where there is none.
    """
    path = root / Path(pattern).expanduser()
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for file in found if file.is_file() or is_saved_dataset(file)]
    if files:
        return files
    if path.is_dir():
        raise UserError(
            f"{where}: {pattern} is a directory, and none that `datasets` saved: name its files, for example "
            f"{pattern}/*.jsonl"
        )
    raise UserError(f"{where}: no file matches {pattern!r} (looked for {path.absolute()})")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or several splits of one, into this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def resolve_path(path: str, root: Path) -> Path:
    """A path in the settings is relative to the project's directory."""
    return (root / Path(path).expanduser()).resolve()
