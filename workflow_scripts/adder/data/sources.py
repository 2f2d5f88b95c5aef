"""Where rows come from: each source as the local files that hold its rows, and what is said of them."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from adder.core.errors import UserError
from adder.core.files import sha256_file
from adder.core.paths import files_in, local_files
from adder.core.progress import Progress
from adder.data import documents, http_download, readers
from adder.data.compression import SUFFIXES
from adder.data.records import HubRecord, Origin, SourceRecord, Split
from adder.data.row_types import Layout
from adder.data.stage import Source

# Settings that only some formats have use for.
FOR_FORMATS = (
    ("delimiter", ("csv", "tsv"), "CSV files"),
    ("header", ("csv", "tsv", "spreadsheet"), "CSV files and spreadsheets"),
    ("table", ("sqlite", "spreadsheet"), "SQLite files and spreadsheets"),
)


@dataclass(frozen=True, kw_only=True)
class File:
    """A local file (or folder that `datasets` saved) with rows; path is None for the built-in generator.

    documents: files that are a row each, with their encodings; path is the folder that they are in.

    label: the parts of which its short name is made, the telling one last. shown: its path in sources.json. notes:
    what reading it found, by a sentence.
    """

    path: Path | None
    label: tuple[str, ...]
    origin: Origin
    shown: str | None
    layout: Layout
    license: str | None = None
    revision: str | None = None
    hub: HubRecord | None = None
    documents: tuple[tuple[Path, str], ...] = ()
    notes: Counter[str] = field(default_factory=Counter)


def fetch(source: Source, where: str, progress: Progress) -> list[File]:
    """The files of one source, in order, fetched where they are elsewhere.

    where: the setting's name, such as "data.sources.0". Raises UserError for a file that is missing, can't be fetched
    or read in any of its encodings, or has another SHA-256 than expected.
    """
    if source.hub is not None:
        return _hub_files(source.hub, source, where, progress)
    if source.url is not None:
        path = http_download.fetch(source.url, f"{where}.url", progress, source.sha256, source.token_env)
        return [_file(source, path, _label(http_download.named_after(source.url)), "url", source.url)]
    if source.path is not None:
        paths = local_files(source.path, f"{where}.path")
        if source.sha256:
            _check_sha256(paths, source.sha256, source.path, where)
        texts = [] if source.convert else [path for path in paths if _is_document(source, path)]
        if len(texts) < 2:
            return [_file(source, path, _label(path.parts), "path", str(path)) for path in paths]
        others = [
            _file(source, path, _label(path.parts), "path", str(path)) for path in paths if path not in set(texts)
        ]
        return [_documents(source, texts), *others]
    label = (f"{source.builtin}-{source.part}",)
    return [File(path=None, label=label, origin="builtin", shown=None, layout=Layout(format="builtin"), license="MIT")]


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


def describe(source: Source, file: File, name: str, split: Split | None, rows: int, unreadable: int) -> SourceRecord:
    """What sources.json says of one file, of which so many rows were taken."""
    record: SourceRecord = {
        "name": name,
        "kind": file.layout.format,
        "origin": file.origin,
        "path": file.shown,
        "sha256": None if file.path is None else _sha256(file.path, [path for path, _ in file.documents]),
        "license": file.license,
        "revision": file.revision,
        "encoding": file.layout.encoding,
        "limit": source.limit,
        "sample": source.sample,
        "weight": source.weight,
        "split": split,
        "rows": rows,
        "unreadable": unreadable,
    }
    if source.builtin is not None and source.rows is not None:
        record["builtin"] = {
            "builtin": source.builtin,
            "rows": source.rows,
            "part": source.part,
            "seed": source.seed,
        }
    if file.hub is not None:
        record["hub"] = file.hub
    if source.convert is not None:
        convert = Path(source.convert)
        record["convert"] = {"path": str(convert), "sha256": sha256_file(convert.expanduser())}
    if file.notes:
        record["notes"] = [f"{note} ({count:,})" if count > 1 else note for note, count in sorted(file.notes.items())]
    return record


def _hub_files(name: str, source: Source, where: str, progress: Progress) -> list[File]:
    from adder.data import hub_dataset  # not at the top: slow to import, for one kind of source

    wanted = hub_dataset.Subset(name, source.revision, source.config, source.split or "train")
    found = hub_dataset.fetch(wanted, f"{where}.hub", progress)
    owner, _, last = name.rpartition("/")
    label = "-".join([last, *([found.config] if found.config != "default" else []), found.split])
    files = []
    for number, (path, local) in enumerate(found.paths.items(), 1):
        own = f"{label}-{number}" if len(found.paths) > 1 else label
        files.append(
            _file(
                source,
                local,
                (owner, own),
                "hub",
                f"{name}/{path}",
                delimiter=found.delimiter if found.delimiter != "," else None,  # a comma is just the default
                license=source.license or found.license,
                revision=found.commit,
                hub={"id": name, "config": found.config, "split": found.split, "file": path},
            )
        )
    return files


def _is_document(source: Source, path: Path) -> bool:
    return path.is_file() and readers.format_of(path, source.format) == "text"


def _documents(source: Source, paths: list[Path]) -> File:
    """Several documents as one file of so many rows: thousands of files would be thousands of sources elsewhere."""
    folder = documents.common_folder(paths)
    encoded = tuple((path, readers.fitting_encoding(path, source.encoding)) for path in paths)
    whole = Path(source.path or "").expanduser()
    left_out = len(files_in(whole)) - len(paths) if whole.is_dir() else 0
    return File(
        path=folder,
        label=folder.parts or ("documents",),
        origin="path",
        shown=source.path,
        layout=Layout(format="text", encoding=" or ".join(sorted({encoding for _, encoding in encoded}))),
        license=source.license,
        documents=encoded,
        notes=Counter({"the folder has files of other kinds, which are left out": left_out} if left_out else {}),
    )


def _file(
    source: Source,
    path: Path,
    label: tuple[str, ...],
    origin: Origin,
    shown: str,
    delimiter: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    hub: HubRecord | None = None,
) -> File:
    """The file with its format and encoding."""
    if source.convert is not None:
        format = "converted"
    elif path.is_dir():
        format = "arrow"
    else:
        format = readers.format_of(path, source.format, shown)
    for name, formats, kinds in FOR_FORMATS:
        if getattr(source, name) and format not in formats:
            raise UserError(f"{shown}: `{name}` is for {kinds}, and this one is read as {format}")
    split = source.split if origin != "hub" else None  # of a hub data set, its files are those of the split
    encoding = None
    if format == "converted" or format in readers.TEXT_FORMATS:
        encoding = readers.fitting_encoding(path, source.encoding)
    return File(
        path=path,
        label=label,
        origin=origin,
        shown=shown,
        layout=Layout(
            format=format,
            encoding=encoding,
            convert=source.convert,
            split=split,
            table=source.table,
            delimiter=source.delimiter or delimiter,
            header=tuple(source.header) if source.header else None,
            columns=tuple(source.columns.values()),
        ),
        license=license or source.license,
        revision=revision,
        hub=hub,
    )


def _check_sha256(paths: list[Path], expected: str, pattern: str, where: str) -> None:
    """Raise UserError where the one file has another SHA-256 (that of a URL is checked when it is fetched)."""
    if len(paths) > 1 or paths[0].is_dir():
        raise UserError(f"{where}.sha256: is the digest of one file; {pattern} stands for several")
    if (found := sha256_file(paths[0])) != expected:
        raise UserError(f"{where}.sha256: {paths[0]} has SHA-256 {found}, expected {expected}")


def _label(parts: tuple[str, ...]) -> tuple[str, ...]:
    last = parts[-1]
    return (*parts[:-1], Path(last[: -len(Path(last).suffix)] if last.lower().endswith(SUFFIXES) else last).stem)


def _sha256(path: Path, documents: list[Path]) -> str:
    """Of a file its SHA-256; of a folder that of the list that `sha256sum` writes of its files, or of the documents."""
    if path.is_file():
        return sha256_file(path)
    files = documents or sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{sha256_file(file)}  {file.relative_to(path)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()
