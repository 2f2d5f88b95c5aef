"""Data sets of the Hugging Face hub: one commit's files of one configuration and split, through the client's cache.

Which files these are is decided by `datasets` itself, from the data set's card and the names of its files.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.data.hub_errors import HTTPError, explain

CARD = ["README.md", ".huggingface.yaml"]  # what tells configurations and licence
# `datasets` would look into archives, which are not fetched yet when it is asked; no reader of ours opens them either.
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".py")


@dataclass(frozen=True)
class Subset:
    """What is asked for: one split of one configuration (None: the default one) of a data set at a revision."""

    id: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set: the commit, licence, configuration and split, local paths by name, a CSV's delimiter."""

    commit: str
    license: str | None
    config: str
    split: str
    paths: dict[str, Path]
    delimiter: str | None


def fetch(wanted: Subset, where: str, progress: Progress) -> HubFiles:
    """Fetch the files that the subset consists of.

    where: the setting's name, such as "data.sources.0.hub". Without a network a commit whose files the client's cache
    holds whole is as good. Raises UserError with what to do about it.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings repeat the addresses of files, which the hub signs
    # Only the environment's token: one from a login file would make the same configuration behave differently.
    token = os.environ.get("HF_TOKEN") or False
    try:
        cached = Path(
            snapshot_download(
                wanted.id, repo_type="dataset", revision=wanted.revision, allow_patterns=CARD, token=token
            )
        )
        commit = cached.name
        listing = [file.path for file in get_cached_repo_tree(wanted.id, repo_type="dataset", revision=commit)]
        config, names, delimiter = _files_of(wanted, where, cached, listing)
        progress.say(f"fetching {wanted.id} at commit {commit}: {config}, {wanted.split}, {len(names)} file(s)")
        snapshot_download(wanted.id, repo_type="dataset", revision=commit, allow_patterns=_literal(names), token=token)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(_message(wanted, where, error)) from error
    paths = {name: cached / name for name in names}
    return HubFiles(commit, _license(cached), config, wanted.split, paths, delimiter)


def _files_of(wanted: Subset, where: str, cached: Path, listing: list[str]) -> tuple[str, list[str], str | None]:
    """The configuration, the names of the split's files, and their delimiter, as `datasets` tells by names alone.

    It looks at a folder that has the data set's card and, under the right names, empty files.
    """
    import datasets

    with tempfile.TemporaryDirectory(prefix="adder-names-") as scratch:
        folder = Path(scratch).resolve() / "names"
        folder.mkdir()
        for file in listing:
            if not file.lower().endswith(ARCHIVES) and ".." not in Path(file).parts:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).touch()
        for card in CARD:
            if (cached / card).is_file():
                (folder / card).write_bytes((cached / card).read_bytes())
        try:
            config = _config(wanted, where, datasets.get_dataset_config_names(str(folder)), str(folder))
            builder = datasets.load_dataset_builder(str(folder), name=config, cache_dir=f"{scratch}/cache")
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise UserError(
                f"{where}: {wanted.id} has no data files that can be read ({type(error).__name__}). It may consist of "
                "archives or a loading script: try `revision: refs/convert/parquet`, where the hub puts its own copy."
            ) from error
        files = {str(key): list(value) for key, value in (builder.config.data_files or {}).items()}
        if wanted.split not in files:
            raise UserError(
                f"{where}: {wanted.id} has no split '{wanted.split}' in its configuration '{config}'; it has: "
                f"{', '.join(files)}"
            )
        if field := getattr(builder.config, "field", None):
            raise UserError(
                f"{where}: {wanted.id} keeps its rows under the key '{field}' of a JSON file; fetch the file by `url:` "
                "with a `convert:` of yours"
            )
        names = [str(Path(file).relative_to(folder)) for file in files[wanted.split]]
    delimiter = getattr(builder.config, "delimiter", None) or getattr(builder.config, "sep", None)
    return config, names, delimiter


def _config(wanted: Subset, where: str, names: list[str], folder: str) -> str:
    import datasets

    asked = wanted.config
    has = f"it has: {', '.join(names)}"
    if asked and asked not in names:
        raise UserError(f"{where}: {wanted.id} has no configuration '{asked}'; {has}")
    chosen = asked or (names[0] if len(names) == 1 else datasets.get_dataset_default_config_name(folder))
    if not chosen:
        raise UserError(f"{where}: {wanted.id} has several configurations; set `config:`, {has}")
    return chosen


def _literal(names: list[str]) -> list[str]:
    """Patterns that match just these names."""
    import glob

    return [glob.escape(name) for name in names]


def _license(cached: Path) -> str | None:
    """`license` of the data set's card."""
    from huggingface_hub import DatasetCard

    if not (cached / "README.md").is_file():
        return None
    found = DatasetCard((cached / "README.md").read_text(encoding="utf-8", errors="replace")).data.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else found


def _message(wanted: Subset, where: str, error: Exception) -> str:
    return explain(
        error,
        f"{where}: {wanted.id}",
        no_revision=f"has no revision '{wanted.revision}' (a branch, a tag or a commit)",
        missing="is not a data set on the hub. Check the spelling",
        unreachable="is not whole in the hub's cache, and the hub is out of reach (HF_HUB_OFFLINE, or no network). "
        f"Fetch it where there is a network: hf download --repo-type dataset {wanted.id}",
    )
