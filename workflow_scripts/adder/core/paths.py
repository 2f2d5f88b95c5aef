"""Paths and URLs as the configuration names them. Light to import: the workflow is parsed with it."""

import glob
import re
from pathlib import Path

from adder.core.errors import UserError

# Of an adapter, as PEFT writes it.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DOCUMENTS = (".txt", ".md", ".markdown")
# Files of rows, also ones that can't be read: a README beside them is no document to learn.
ROWS = {
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".sqlite",
    ".db",
    ".xlsx",
    ".ods",
    ".xls",
}


def local_files(pattern: str, where: str, root: Path = Path()) -> list[Path]:
    """The files, and folders that `datasets` saved, that a path or pattern stands for, sorted.

    A relative one starts at `root`; a folder of documents stands for these. Raises UserError where there is none.
    """
    path = root / Path(pattern).expanduser()
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [file for file in found if file.is_file() or is_saved_dataset(file)]
    if files:
        return files
    if path.is_dir():
        if documents := documents_in(path):
            return documents
        raise UserError(
            f"{where}: {pattern} is a directory, and none that `datasets` saved or that holds just text: name its "
            f"files, for example {pattern}/*.jsonl"
        )
    raise UserError(f"{where}: no file matches {pattern!r} (looked for {path.absolute()})")


def documents_in(folder: Path) -> list[Path]:
    """The text and Markdown files in a folder and those below it, sorted; none where files of rows are among them."""
    files = files_in(folder)
    if any(ROWS.intersection(suffix.lower() for suffix in file.suffixes) for file in files):
        return []
    return [file for file in files if file.suffix.lower() in DOCUMENTS]


def files_in(folder: Path) -> list[Path]:
    """The files in a folder and those below it, sorted, but for hidden ones."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or several splits of one, into this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def resolve_path(path: str, root: Path) -> Path:
    """A path in the settings is relative to the project's directory."""
    return (root / Path(path).expanduser()).resolve()


def adapter_folder(adapter: str, root: Path = Path()) -> Path | None:
    """The folder that `model.adapter` names; None where it names one of the hub.

    Raises UserError for a folder that isn't there or holds no adapter in safetensors.
    """
    path = resolve_path(adapter, root)
    if not path.exists():
        if adapter.startswith((".", "/", "~")) or not HUB_ID.fullmatch(adapter):
            raise UserError(f"model.adapter: {adapter!r} is neither a folder here ({path}) nor a hub id (owner/name)")
        return None
    missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if missing:
        pickle = " Its weights are in a pickle, which can run code when loaded: save it again with PEFT."
        hint = pickle if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"model.adapter: {adapter} holds no {missing[0]}, as PEFT writes it.{hint}")
    return path
