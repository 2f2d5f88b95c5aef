"""Paths and URLs as the configuration names them. Light to import: the workflow is parsed with it."""

import glob
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from adder.errors import UserError

VARIABLE = re.compile(r"\$\{(\w+)\}")
# Names in a query whose values give access: token, sig, X-Amz-Signature, api_key and the like.
SECRET_NAME = re.compile(
    r"(^|[-_.])(sig|signature|secret|password|passwd|pwd|auth|authorization|(api|access|secret|account)[-_]?key)$"
    r"|token$|^key$",
    re.IGNORECASE,
)


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


def refuse_secrets(url: str, where: str) -> None:
    """Raise UserError where a password or token is written out in a URL: it would stand in reports and records."""
    parts = urlsplit(url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    # Elsewhere a name without a password is none (abfs://container@account).
    written = [("what stands before @", password or (user if parts.scheme in ("http", "https") else ""))]
    written += [(f"`{name}`", value) for name, value in parse_qsl(parts.query) if SECRET_NAME.search(name)]
    for what, value in written:
        if value and not VARIABLE.search(value):
            raise UserError(
                f"{where}: {what} in this URL looks like a secret, and the configuration is shown in reports. Put it "
                "into an environment variable and write ${NAME} in its place."
            )


def filled_in(url: str, where: str) -> tuple[str, dict[str, str]]:
    """The URL with its variables' values, and {value: "${NAME}"}."""
    values = {}
    for name in VARIABLE.findall(url):
        if not os.environ.get(name):
            raise UserError(f"{where}: {url} needs the environment variable {name}, which is not set")
        values[name] = os.environ[name]
    filled = VARIABLE.sub(lambda match: values[match.group(1)], url)
    return filled, {value: f"${{{name}}}" for name, value in values.items()}
