"""Raw rows out of local files: JSON, JSON lines, CSV, Parquet, a converter of the user's, or the built-in generator.

A row that can't be read becomes an `Unreadable` with its reason and stays in the count; a file that can't be read is
a UserError.
"""

import codecs
import csv
import glob
import hashlib
import heapq
import itertools
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adder.errors import UserError

FORMATS_BY_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
MAX_NESTING = 64  # Python's own JSON reader gives up at about a thousand; no conversation needs more than this
MAX_RAW = 500  # characters of an unreadable row that are kept to show it
PARQUET_BATCH = 1024  # rows in memory at a time
SINGLE_ROW_KEYS = ("messages", "conversations")  # lists that belong to one row rather than being a list of rows


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be read: why, and how it begins."""

    reason: str
    raw: str = ""


Row = dict | Unreadable


def files_of(source: dict) -> list[Path | None]:
    """The files of one source in sorted order; [None] for a built-in one. UserError where a path matches nothing."""
    if source.get("builtin"):
        return [None]
    pattern = str(Path(source["path"]).expanduser())
    if Path(pattern).is_file():
        return [Path(pattern)]
    if Path(pattern).is_dir():
        raise UserError(f"data: {source['path']} is a directory: name its files, for example {source['path']}/*.jsonl")
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if paths:
        return paths
    if glob.has_magic(pattern):
        raise UserError(f"data: no file matches {source['path']} (looked from {Path.cwd()})")
    raise UserError(f"data: there is no file {source['path']} (looked from {Path.cwd()})")


def short_names(files: list[tuple[dict, Path | None]]) -> list[str]:
    """A short, unique name for each (source, file): the file's stem, led by as many folders as it takes to tell it
    from the others; for a built-in source its name and part. One that is listed twice is numbered.
    """
    parts = [
        (*path.parent.parts, path.stem) if path else (f"{source['builtin']}-{source['part']}",)
        for source, path in files
    ]
    names = []
    for own in parts:
        others = {other for other in parts if other != own}
        length = next((n for n in range(1, len(own)) if not any(o[-n:] == own[-n:] for o in others)), len(own))
        names.append("/".join(own[-length:]))
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[index] = f"{name}#{seen[name]}"
    return names


def read_source(source: dict, named: list[tuple[str, Path | None]]) -> Iterator[tuple[str, int, Row]]:
    """Yield (file's name, row number from 1, row) for all files of one source.

    source: {path, encoding, format, convert, limit, sample, license} or {builtin, rows, part, seed}. `limit` keeps the
    first N rows of the source; `sample` keeps the N rows whose content hashes lowest, in file order, so that the same
    rows are picked wherever they stand. Unreadable rows count as rows in both.
    """
    found = ((name, number, row) for name, path in named for number, row in _read_file(source, path))
    if source.get("limit") is not None:
        found = itertools.islice(found, source["limit"])
    if source.get("sample") is not None:
        ranked = ((_content_hash(item[2]), order, item) for order, item in enumerate(found))
        kept = heapq.nsmallest(source["sample"], ranked, key=lambda entry: entry[:2])
        found = (item for _, _, item in sorted(kept, key=lambda entry: entry[1]))
    yield from found


def describe(source: dict, path: Path | None) -> dict:
    """What sources.json says of one file: kind, path, sha256, license, and the converter with its own sha256."""
    if path is None:
        return {
            "kind": "builtin",
            "path": None,
            "sha256": None,
            "license": "MIT",
            "builtin": {key: source[key] for key in ("builtin", "rows", "part", "seed")},
        }
    convert = source.get("convert")
    entry = {
        "kind": "converted" if convert else format_of(source, path),
        "path": str(path),
        "sha256": sha256_file(path),
        "license": source.get("license"),
    }
    if convert:
        entry["convert"] = {"path": str(convert), "sha256": sha256_file(Path(convert).expanduser())}
    return entry


def encode_record(name: str, number: int, split: str | None, row: Row) -> str:
    """One line of rows.jsonl. A row that JSON or UTF-8 can't hold is written as unreadable."""
    record: dict[str, Any] = {"source": name, "row": number, "split": split}
    if not isinstance(row, Unreadable):
        try:
            line = json.dumps({**record, "data": row}, sort_keys=True, ensure_ascii=False, default=_jsonable)
            line.encode("utf-8")
            if _nesting(line) <= MAX_NESTING:
                return line
            row = Unreadable(f"nested more than {MAX_NESTING} levels deep")
        except UnicodeEncodeError as error:
            row = Unreadable(f"invalid unicode: half a surrogate pair ({error.object[error.start]!a})")
        except (TypeError, ValueError, RecursionError) as error:
            row = Unreadable(f"not representable in JSON: {error}")
    raw = row.raw[:MAX_RAW].encode("utf-8", "backslashreplace").decode("utf-8")
    record |= {"error": row.reason.encode("utf-8", "backslashreplace").decode("utf-8"), "raw": raw}
    return json.dumps(record, sort_keys=True, ensure_ascii=False)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_of(source: dict, path: Path) -> str:
    """The source's `format`, or for "auto" the one that the file's ending tells."""
    chosen = source.get("format") or "auto"
    if chosen != "auto":
        return chosen
    suffix = path.suffix.lower()
    if suffix not in FORMATS_BY_SUFFIX:
        raise UserError(
            f"{path}: can't tell the format from the ending '{suffix}'. Set `format:` to json, jsonl, csv or parquet, "
            "or `convert:` to a Python file with a function rows(path, encoding)."
        )
    return FORMATS_BY_SUFFIX[suffix]


def _read_file(source: dict, path: Path | None) -> Iterator[tuple[int, Row]]:
    if path is None:
        yield from enumerate(_builtin_rows(source), 1)
        return
    encoding = source.get("encoding") or "utf-8"
    # A byte-order mark is no part of the text.
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        if source.get("convert"):
            yield from enumerate(_converted_rows(source["convert"], path, encoding), 1)
        else:
            yield from READERS[format_of(source, path)](path, encoding)
    except LookupError as error:
        if "encoding" not in str(error):
            raise
        raise UserError(f"{path}: `encoding: {source['encoding']}` is not a text encoding that Python knows") from error
    except UnicodeError as error:
        raise UserError(_encoding_message(path, encoding)) from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error}") from error


def _builtin_rows(source: dict) -> Iterator[Row]:
    if source["builtin"] != "tickets":
        raise UserError(f"data: there is no built-in source '{source['builtin']}'; there is: tickets")
    from adder import tickets

    yield from tickets.rows(count=source["rows"], part=source["part"], seed=source["seed"])


def _read_jsonl(path: Path, encoding: str) -> Iterator[tuple[int, Row]]:
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_line(line, number)


def _parse_line(line: str, number: int) -> Row:
    try:
        return _as_row(json.loads(line))
    except json.JSONDecodeError as error:
        reason = f"broken JSON at line {number}, column {error.colno}: {error.msg}"
    except RecursionError:
        reason = "nested too deep to be read"
    except ValueError as error:  # a whole number of more than 4,300 digits
        reason = f"broken JSON at line {number}: {error}"
    return Unreadable(reason, line.rstrip("\n")[:MAX_RAW])


def _as_row(value: Any) -> Row:
    if isinstance(value, dict):
        return value
    return Unreadable(
        f"not an object with named columns but {_kind(value)}",
        str(value)[:MAX_RAW] if isinstance(value, str | int | float) else "",
    )


def _read_json(path: Path, encoding: str) -> Iterator[tuple[int, Row]]:
    text = path.read_text(encoding=encoding)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().split("\n", 1)[0]
        if error.msg == "Extra data" and isinstance(_parse_line(first, 1), dict):
            yield from _read_jsonl(path, encoding)  # JSON lines under another name are common
            return
        raise UserError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}. "
            "If each line is a value of its own, set `format: jsonl`."
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from error
    for number, row in enumerate(_rows_of_value(path, value), 1):
        yield number, _as_row(row)


def _rows_of_value(path: Path, value: Any) -> list:
    """The rows in a JSON file: the list itself, the list(s) under an object's keys, or columns of one length."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and any(key in value for key in SINGLE_ROW_KEYS):
        return [value]
    lists = {key: item for key, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    if any(isinstance(item, dict) for rows in lists.values() for item in rows):
        return [row for rows in lists.values() for row in rows]
    if len(lists) > 1 and len(lists) == len(value) and len({len(column) for column in lists.values()}) == 1:
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    keys = f" with the keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
    raise UserError(
        f"{path}: expected a list of objects, or an object that holds such lists; found {_kind(value)}{keys}. "
        "`convert:` can name a Python file that reads any other layout."
    )


def _read_csv(path: Path, encoding: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding=encoding, newline="") as file:
        # strict: an unclosed quote must be an error, not a cell that swallows the rest of the file.
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UserError(f"{path}: the header can't be read: {error}") from error
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise UserError(f"{path}: the header names the column '{repeated[0]}' more than once")
        number = 0
        while True:
            number += 1
            first_line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                reason = f"broken CSV in lines {first_line} to {reader.line_num}: {error}"
                yield number, Unreadable(reason)
                continue
            if cells is None:
                return
            if not cells:  # a blank line
                number -= 1
            elif len(cells) != len(header):
                reason = f"{len(cells)} cells at line {first_line}, the header has {len(header)}"
                yield number, Unreadable(reason, ",".join(cells)[:MAX_RAW])
            else:
                yield number, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path, encoding: str) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=PARQUET_BATCH)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pa.ArrowException as error:
        raise UserError(f"{path}: can't be read as Parquet: {error}") from error


READERS = {"json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}


def _converted_rows(convert: str, path: Path, encoding: str) -> Iterator[Row]:
    """Rows as the user's own `rows(path, encoding)` yields them; whatever it raises is named with its line."""
    converter = Path(convert).expanduser()
    if not converter.is_file():
        raise UserError(f"data: `convert: {convert}` is not a file (looked from {Path.cwd()})")
    module = types.ModuleType("adder_converter")
    module.__file__ = str(converter)
    try:
        # Not imported: an import would leave a __pycache__ beside the user's file and could run a stale one.
        exec(compile(converter.read_bytes(), str(converter), "exec"), module.__dict__)
        rows = getattr(module, "rows", None)
        if not callable(rows):
            raise UserError(f"{convert}: has no function rows(path, encoding) that yields one dictionary a row")
        for row in rows(str(path), encoding):
            yield _as_row(row)
    except (UserError, UnicodeDecodeError):
        raise
    except Exception as error:
        line = _line_within(converter, sys.exc_info()[2])
        raise UserError(f"{convert}{line}: {type(error).__name__} while converting {path}: {error}") from error


def _line_within(file: Path, traceback) -> str:
    """ ", line N" for the deepest frame that runs `file`."""
    line = ""
    while traceback:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = f", line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return line


def _encoding_message(path: Path, encoding: str) -> str:
    """Name the first byte that is not valid in `encoding` (the decoder's own position counts within a buffer)."""
    where = "it"
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    with path.open("rb") as file:
        try:
            while chunk := file.read(1 << 20):
                read += len(chunk)
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The decoder's object ends where reading stands; it starts later than the file by what was decoded before.
            where = f"byte {read - len(error.object) + error.start} (0x{error.object[error.start]:02x})"
        except UnicodeError:
            pass
    return (
        f"{path}: {where} is not valid {encoding.removesuffix('-sig')}. "
        "Set `encoding:` of this source to the file's own, for example latin-1, cp1252 or utf-16."
    )


def _content_hash(row: Row) -> bytes:
    try:
        text = row.raw if isinstance(row, Unreadable) else json.dumps(row, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # becomes an unreadable row when it is written
        text = ""
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _jsonable(value: Any) -> Any:
    """Parquet's dates, times and decimals as text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__name__ == "Decimal":
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def _nesting(line: str) -> int:
    """Levels of nesting in a line of JSON, the record's own level not counted; brackets within text count at most."""
    if line.count("{") + line.count("[") <= MAX_NESTING:
        return 0
    deepest, level = 0, [json.loads(line)["data"]]
    while level and deepest <= MAX_NESTING:
        deepest += 1
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return deepest


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
