"""Where rows come from: each source as the local files that hold its rows, and what is said of them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from adder.core.errors import UserError
from adder.core.files import sha256_file
from adder.core.paths import local_files
from adder.core.progress import Progress
from adder.data import http_download, readers


@dataclass(frozen=True)
class File:
    """A local file (or folder that `datasets` saved) with rows; path is None for the built-in generator.

    label: the parts of which its short name is made, the telling one last. encoding: of text formats only.
    about: what sources.json says of where it came from.
    """

    path: Path | None
    label: tuple[str, ...]
    format: str = "builtin"
    encoding: str | None = None
    delimiter: str | None = None
    about: dict = field(default_factory=dict)


def fetch(source: dict, where: str, progress: Progress) -> list[File]:
    """The files of one source, in order, fetched where they are elsewhere.

    source: a settings.Source; where: the setting's name, such as "data.sources.0". Raises UserError for a file that is
    missing, can't be fetched or read in any of its encodings, or has another SHA-256 than expected.
    """
    if source.get("builtin"):
        return [
            File(
                None,
                (f"{source['builtin']}-{source['part']}",),
                about={"origin": "builtin", "path": None, "license": "MIT"},
            )
        ]
    if source.get("hub"):
        files = _hub_files(source, where, progress)
    elif source.get("url"):
        path = http_download.fetch(source, f"{where}.url", progress)
        files = [
            File(path, _label(http_download.named_after(source["url"])), about={"origin": "url", "path": source["url"]})
        ]
    else:
        paths = local_files(source["path"], f"{where}.path")
        files = [File(path, _label(path.parts), about={"origin": "path", "path": str(path)}) for path in paths]
    return [_opened(source, where, file, single=len(files) == 1) for file in files]


def short_names(files: list[File]) -> list[str]:
    """A short, unique name for each file: the last part of its label, led by as many others as it takes to tell it
    from the rest. One that is listed twice is numbered.
    """
    labels = [file.label for file in files]
    names = []
    for own in labels:
        others = {other for other in labels if other != own}
        length = next((n for n in range(1, len(own)) if not any(o[-n:] == own[-n:] for o in others)), len(own))
        names.append("/".join(own[-length:]))
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[index] = f"{name}#{seen[name]}"
    return names


def describe(source: dict, file: File) -> dict:
    """What sources.json says of one file: kind, path (a local path, a URL as it is configured, or a hub id and the
    file's name), sha256, license, revision, encoding, how many rows are taken and how they are weighed.
    """
    entry = {"kind": file.format, "sha256": None, "license": source.get("license"), "revision": None} | file.about
    entry |= {"encoding": file.encoding, "limit": source.get("limit"), "sample": source.get("sample")}
    entry["weight"] = source.get("weight", 1.0)
    if file.path is None:
        entry["builtin"] = {key: source[key] for key in ("builtin", "rows", "part", "seed")}
    else:
        entry["sha256"] = _sha256(file.path)
    if source.get("convert"):
        convert = Path(source["convert"])
        entry["convert"] = {"path": str(convert), "sha256": sha256_file(convert.expanduser())}
    return entry


def _hub_files(source: dict, where: str, progress: Progress) -> list[File]:
    from adder.data import hub_dataset

    found = hub_dataset.fetch(source, f"{where}.hub", progress)
    owner, _, name = source["hub"].rpartition("/")
    label = "-".join([name, *([found.config] if found.config != "default" else []), found.split])
    files = []
    for number, (path, local) in enumerate(found.paths.items(), 1):
        about = {
            "origin": "hub",
            "path": f"{source['hub']}/{path}",
            "revision": found.commit,
            "license": source.get("license") or found.license,
            "hub": {"id": source["hub"], "config": found.config, "split": found.split, "file": path},
        }
        own = f"{label}-{number}" if len(found.paths) > 1 else label
        files.append(File(local, (owner, own), delimiter=found.delimiter, about=about))
    return files


def _opened(source: dict, where: str, file: File, single: bool) -> File:
    """The file with its format and encoding, after the check of its digest."""
    expected = source.get("sha256")
    if expected and not source.get("url"):  # that of a URL is checked when it is fetched
        if not single or file.path.is_dir():
            raise UserError(f"{where}.sha256: is the digest of one file; {source['path']} stands for several")
        if (found := sha256_file(file.path)) != expected:
            raise UserError(f"{where}.sha256: {file.path} has SHA-256 {found}, expected {expected}")
    if source.get("convert"):
        format = "converted"
    elif file.path.is_dir():
        format = "arrow"
    else:
        format = readers.format_of(file.path.name, source.get("format"), shown=file.about["path"])
    encoding = None
    if format == "converted" or format in readers.TEXT_FORMATS:
        encoding = readers.fitting_encoding(file.path, source.get("encoding") or "utf-8")
    return replace(file, format=format, encoding=encoding)


def _label(parts: tuple[str, ...]) -> tuple[str, ...]:
    return (*parts[:-1], Path(readers.bare_name(parts[-1])).stem)


def _sha256(path: Path) -> str:
    """Of a file its SHA-256; of a folder that of the list that `sha256sum` writes of its files."""
    import hashlib

    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{sha256_file(file)}  {file.relative_to(path)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()
