"""Readers of local files: JSON, JSON lines, CSV, TSV, Parquet, ORC, Arrow, SQLite, text, each as a stream of rows.

Compressed files are known by their first bytes. A row that can't be read becomes an `Unreadable` with its reason and
stays in the count; a file that can't be read is a UserError.
"""

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import orjson

from adder.core.errors import UserError
from adder.core.paths import DOCUMENTS
from adder.data import columnar, converter, csv_rows, json_stream, spreadsheet, sqlite_table
from adder.data.compression import CHUNK, bare_name, is_compressed, open_bytes
from adder.data.json_stream import kind
from adder.data.repeated_keys import RepeatedKeyError, check_keys, refuse_repeated
from adder.data.row_types import MAX_RAW, Layout, Row, Unreadable

FORMATS_BY_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".orc": "orc",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".db": "sqlite",
    **dict.fromkeys((".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"), "spreadsheet"),
    **dict.fromkeys(DOCUMENTS, "text"),
}
TEXT_FORMATS = ("json", "jsonl", "csv", "tsv", "text")
NO_READER = {
    ".numbers": "export it as CSV or .xlsx",
    ".docx": "save it as text or Markdown",
    ".doc": "save it as text or Markdown",
    ".pdf": "turn it into text or Markdown first",
    ".html": "turn it into text or Markdown first",
    ".pkl": "save the table as Parquet: a pickle runs code when it is read",
    ".pickle": "save the table as Parquet: a pickle runs code when it is read",
    ".yaml": "save the rows as JSON lines",
    ".yml": "save the rows as JSON lines",
    ".xml": "save the rows as JSON lines, or name a Python file that reads it by `convert:`",
    ".avro": "save the table as Parquet",
}
MAX_FIRST_LINE = 1 << 26  # characters of a first line that are looked at to tell JSON lines from JSON

REPEATED = "repeated key"
OTHER_LETTERS = re.compile(rb"[\x80-\xff]{4}")  # in languages that cp1252 is for, letters beyond ASCII stand alone
# orjson reads whole numbers of more than 64 bits as floats, which have 15 digits: these go to Python's own reader.
DIGITS = bytes(ord("0") if 48 <= code <= 57 else ord(" ") for code in range(256))
LONG_NUMBER = b"0" * 19


def format_of(path: Path, chosen: str | None = None, shown: str | None = None) -> str:
    """The source's `format` if it chose one, else what the ending of a file's name tells, without its compression's.

    `shown` is what a message calls the file.
    """
    if chosen and chosen != "auto":
        return chosen
    suffix = Path(bare_name(path)).suffix.lower()
    if suffix in NO_READER:
        raise UserError(f"{shown or path}: {suffix} files aren't read; {NO_READER[suffix]}")
    if suffix not in FORMATS_BY_SUFFIX:
        raise UserError(
            f"{shown or path}: can't tell the format from the ending '{suffix}'. Set `format:` to json, jsonl, "
            "csv, tsv, parquet, orc, arrow, sqlite, spreadsheet or text, or `convert:` to a Python file with a "
            "function rows(path, encoding)."
        )
    return FORMATS_BY_SUFFIX[suffix]


def read_file(path: Path, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row): the line in a JSONL file, the row elsewhere.

    notes: counts, by a sentence, what people should know of how the file was read. Raises UserError where a file can't
    be read.
    """
    encoding = _without_mark(layout.encoding or "utf-8")
    if layout.split is not None and layout.format not in ("json", "arrow"):
        raise UserError(
            f"{path}: `split: {layout.split}` names a list of a JSON file or a part of a folder that `datasets` saved; "
            f"this one is read as {layout.format}, which has no parts"
        )
    try:
        if layout.convert:
            yield from enumerate(map(_as_row, converter.rows(layout.convert, path, encoding)), 1)
        else:
            yield from READERS[layout.format](path, encoding, layout, notes)
    except LookupError as error:
        if "encoding" not in str(error):
            raise
        raise UserError(_unknown_encoding(path, encoding)) from error
    except UnicodeError as error:
        raise UserError(_encoding_message(path, [encoding])) from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error}") from error


def fitting_encoding(path: Path, encodings: str | list[str]) -> str:
    """Of several encodings the first in which the whole file is valid; a single one is taken as it is, unread."""
    if isinstance(encodings, str) or len(encodings) == 1:
        return encodings if isinstance(encodings, str) else encodings[0]
    for encoding in encodings:
        try:
            if _first_invalid(path, encoding) is None:
                return encoding
        except LookupError as error:
            raise UserError(_unknown_encoding(path, encoding)) from error
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error}") from error
    raise UserError(_encoding_message(path, encodings))


def _open_text(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline=newline)


def _read_jsonl(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    remedy = ""  # for the lines of a file that is one JSON value
    first = True
    for number, line in enumerate(_lines(path, encoding), 1):
        row = json_line(line, number)
        if row is None:
            continue
        if first:
            first, remedy = False, _remedy(line, row)
            if remedy:
                notes[f"the first line isn't a row{remedy}"] = 1
        if remedy and isinstance(row, Unreadable):
            row = Unreadable(row.reason + remedy, row.raw, row.kind)
        yield number, row


def json_line(line: bytes, number: int) -> Row | None:
    """The row of one line of JSON lines in UTF-8, None of a blank one. Raises UnicodeDecodeError."""
    try:
        # Python's own reader takes over wherever the two might not agree, and says what is wrong.
        value = json.loads(line.decode()) if LONG_NUMBER in line.translate(DIGITS) else orjson.loads(line)
    except ValueError:  # of either reader, also for bytes that are not UTF-8
        text = line.decode("utf-8")
        return _parse_line(text, number) if text.strip() else None
    if not isinstance(value, dict):
        return _as_row(value)
    try:
        check_keys(line, value)
    except RepeatedKeyError as error:
        return Unreadable(str(error), line.decode("utf-8").rstrip("\n")[:MAX_RAW], REPEATED)
    return value


def line_ranges(path: Path, layout: Layout, size: int) -> Iterator[tuple[int, int, int]] | None:
    """A large file of JSON lines in ranges of about `size` bytes, to be read by several processes: start, end, and
    the number of the first line in each. None for a file that is to be read from its beginning: any other format or
    encoding, a compressed or small file, and one whose first line is no row.
    """
    plain = layout.format == "jsonl" and not layout.convert and layout.split is None
    if not plain or _without_mark(layout.encoding or "utf-8") != "utf-8-sig" or path.stat().st_size < 2 * size:
        return None
    with path.open("rb") as file:
        if is_compressed(file.read(16)):
            return None
        file.seek(0)
        try:
            if not isinstance(json_line(file.readline(MAX_FIRST_LINE).removeprefix(codecs.BOM_UTF8), 1), dict):
                return None
        except UnicodeDecodeError:
            return None
    return _line_ranges(path, size)


def _line_ranges(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    number = 1
    with path.open("rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        while piece := file.read(size):
            piece += file.readline()
            yield start, start + len(piece), number
            start += len(piece)
            number += len(piece.splitlines()) if b"\r" in piece else piece.count(b"\n")


def lines_of(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file or of a piece of one; they end as in Python's text files, with LF, CR LF or CR."""
    for line in file:
        if b"\r" in line:
            yield from line.splitlines()
        else:
            yield line


def not_utf8(path: Path) -> UserError:
    """What to say where a file that was read as UTF-8 is none."""
    return UserError(_encoding_message(path, ["utf-8-sig"]))


def _remedy(first: bytes, row: Row) -> str:
    """What to do where the first line of JSON lines is a list of rows, or the beginning of a value over many lines."""
    if not isinstance(row, Unreadable):
        return ""
    start = b"".join(first.split())
    if start.startswith(b"[{") and row.kind == "not an object":
        return "; if the file is this one list of rows, set `format: json`"
    if row.kind == "broken JSON" and start.startswith(b'{"'):
        behind = json_stream.behind_first(first.decode("utf-8", "replace"))
        if behind == ",":
            return (
                "; the line ends in a comma: remove these, or put [ before the first line and ] in place of the last "
                "comma, and set `format: json`"
            )
        if behind.startswith("{"):
            return "; several rows stand on one line: set `format: json`"
    if start in (b"[", b"{") or start.startswith((b"[{", b"[[")):
        return "; the file seems to be one JSON value rather than one a line: set `format: json`"
    return ""


def _lines(path: Path, encoding: str) -> Iterator[bytes]:
    """The lines of a text file in UTF-8; a line ends as in Python's text files, with LF, CR LF or CR."""
    if encoding != "utf-8-sig":
        with _open_text(path, encoding) as text:
            for line in text:
                yield line.encode()
        return
    with open_bytes(path) as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
        yield from lines_of(file)


def _parse_line(line: str, number: int) -> Row:
    try:
        return _as_row(json.loads(line, object_pairs_hook=refuse_repeated))
    except RepeatedKeyError as error:
        return Unreadable(str(error), line.rstrip("\n")[:MAX_RAW], REPEATED)
    except json.JSONDecodeError as error:
        reason = f"broken JSON at line {number}, column {error.colno}: {error.msg}"
    except RecursionError:
        return Unreadable("nested too deep to be read", line[:MAX_RAW], "nested too deep")
    except ValueError as error:  # a whole number of more than 4,300 digits
        reason = f"broken JSON at line {number}: {error}"
    return Unreadable(reason, line.rstrip("\n")[:MAX_RAW], "broken JSON")


def _as_row(value: Any) -> Row:
    if isinstance(value, dict):
        return value
    hint = ""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        hint = '; if it is the messages of a conversation, write it as {"messages": [...]}'
    return Unreadable(
        f"not an object with named columns but {kind(value)}{hint}",
        str(value)[:MAX_RAW] if isinstance(value, str | int | float) else "",
        "not an object",
    )


def _read_json(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    def open_text() -> TextIO:
        return _open_text(path, encoding)

    try:
        for number, value in enumerate(json_stream.rows(open_text, layout.split), 1):
            yield number, _as_row(value)
    except json_stream.SeveralValues as error:
        with open_text() as text:
            first = text.readline(MAX_FIRST_LINE)
        if isinstance(_parse_line(first, 1), dict):  # JSON lines under another name are common
            yield from _read_jsonl(path, encoding, layout, notes)
        elif first.lstrip().startswith("{") and layout.split is None:
            yield from _read_values(path, open_text)
        else:
            raise UserError(_broken_json(path, error)) from error
    except json_stream.BrokenJSON as error:
        raise UserError(_broken_json(path, error)) from error
    except json_stream.SeveralLists as error:
        raise UserError(f"{path}: {error}") from error
    except json_stream.UnknownLayout as error:
        raise UserError(
            f"{path}: expected a list of objects, or an object that holds such lists; found {error}. "
            "`convert:` can name a Python file that reads any other layout."
        ) from error


def _read_values(path: Path, open_text: Callable[[], TextIO]) -> Iterator[tuple[int, Row]]:
    """Objects that follow one another, each over several lines or all on one."""
    try:
        for number, value in enumerate(json_stream.values(open_text), 1):
            yield number, _as_row(value)
    except json_stream.BrokenJSON as error:
        raise UserError(_broken_json(path, error)) from error


def _broken_json(path: Path, error: Exception) -> str:
    return f"{path}: broken JSON at {error}. If each line is a value of its own, set `format: jsonl`."


def _read_csv(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    yield from csv_rows.rows(lambda: _open_text(path, encoding, newline=""), path, layout, notes)


def _read_parquet(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    yield from enumerate(columnar.parquet_rows(path, notes), 1)


def _read_orc(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    yield from enumerate(columnar.orc_rows(path, notes), 1)


def _read_arrow(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    yield from enumerate(columnar.arrow_rows(path, layout.split, notes), 1)


def _read_sqlite(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    yield from enumerate(sqlite_table.rows(path, layout.table), 1)


def _read_spreadsheet(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    yield from spreadsheet.rows(path, layout, notes)


def _read_document(path: Path, encoding: str, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    with _open_text(path, encoding) as file:
        yield 1, {"text": file.read()}


READERS: dict[str, Callable[[Path, str, Layout, Counter[str]], Iterator[tuple[int, Row]]]] = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "orc": _read_orc,
    "arrow": _read_arrow,
    "sqlite": _read_sqlite,
    "spreadsheet": _read_spreadsheet,
    "text": _read_document,
}


def _without_mark(encoding: str) -> str:
    """The encoding's name; for UTF-8 the one that skips a byte-order mark, which is no part of the text."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _first_invalid(path: Path, encoding: str) -> str | None:
    """The first byte that is not valid in `encoding`, as "byte N (0xff)", or None where all are.

    Bytes of a compressed file are counted after decompression. Raises LookupError for an encoding that isn't one.
    """
    io.TextIOWrapper(io.BytesIO(), encoding)  # base64 and the like decode too, but not to text
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    with open_bytes(path) as file:
        try:
            while chunk := file.read(CHUNK):
                read += len(chunk)
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The decoder's object ends where reading stands; it starts later than the file by what was decoded before.
            return f"byte {read - len(error.object) + error.start} (0x{error.object[error.start]:02x})"
        except UnicodeError:  # UTF-16 without its byte-order mark, for one
            return "it"
    return None


def _encoding_message(path: Path, encodings: list[str]) -> str:
    found = [f"{_first_invalid(path, encoding) or 'it'} is not valid {encoding}" for encoding in encodings]
    return (
        f"{path}: {', '.join(found).replace('-sig', '')}. "
        f"Set `encoding:` of this source to the file's own, {_likely_encoding(path)}."
    )


def _likely_encoding(path: Path) -> str:
    """The encoding that a file's bytes speak for, with a piece of the text to judge it by."""
    with open_bytes(path) as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "which its first bytes say is `encoding: utf-16`"
    if start[1::2] == b"\0\0" or start[::2] == b"\0\0":
        return f"probably `encoding: {'utf-16-le' if start[1::2] == bytes(2) else 'utf-16-be'}`"
    if _first_invalid(path, "cp1252") is not None:
        return "for example latin-1, utf-16 or cp437"
    with open_bytes(path) as file:
        while chunk := file.read(CHUNK):
            if not chunk.isascii():
                at = next(place for place, byte in enumerate(chunk) if byte > 127)
                shown = chunk[max(0, at - 20) : at + 20].decode("cp1252").split("\n")
                line = next(line for line in shown if not line.isascii()).strip()
                if OTHER_LETTERS.search(chunk[at : at + 2000]) is None:
                    return f"probably Windows' `encoding: cp1252`, in which it reads: {line}"
                return f"for example cp1251, gb18030, shift_jis or euc-kr (in cp1252 it would read: {line})"
    return "for example latin-1, cp1252 or utf-16"


def _unknown_encoding(path: Path, encoding: str) -> str:
    return f"{path}: `encoding: {encoding}` is not a text encoding that Python knows"
