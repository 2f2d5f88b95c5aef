"""The rows of CSV and TSV files as spreadsheets and scripts write them.

Read by the standard library: pandas fills rows with too few cells, stops at a quote that is never closed, and can't say
on which line a row stands.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from adder.core.errors import UserError
from adder.data.row_types import MAX_RAW, Layout, Row, Unreadable

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
MAX_CELL = 1 << 25  # characters: a quote that is never closed must not swallow a file of any size
SAMPLE = 1 << 16  # characters from which the delimiter is told
SEP_LINE = re.compile(r'"?sep=(.)"?[ \t]*', re.IGNORECASE)  # Excel's own first line
SPACED_ROWS = 3  # that are enough to tell that a space belongs to what separates the cells
NUMBER = re.compile(r"[-+]?[\d.,]+%?")
TRIMMED = "rows have empty cells after their last column, which are left out"


class _Start(NamedTuple):
    """What a look at the beginning tells: of a `sep=` line, the delimiter, and whether spaces follow each one."""

    has_sep_line: bool
    delimiter: str
    skip_spaces: bool


def rows(open_text: Callable[[], TextIO], path: Path, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of a file that `open_text` opens, with its lines' ends untouched.

    Names are stripped of spaces; empty cells beyond the last name are left out. A row with other cells than the header
    is unreadable. Raises UserError where the first line is no header.
    """
    csv.field_size_limit(MAX_CELL)
    with open_text() as file:
        start = _look(file.read(SAMPLE), layout)
    default = "\t" if layout.format == "tsv" else ","
    if start.delimiter != default and layout.delimiter is None:
        notes[f"cells are separated by {DELIMITERS.get(start.delimiter, repr(start.delimiter))}"] = 1
    with open_text() as file:
        if start.has_sep_line:
            file.readline()
        before = int(start.has_sep_line)
        # strict: an unclosed quote must be an error, not a cell that swallows the rest of the file.
        if start.skip_spaces:
            notes["spaces behind what separates the cells are left out"] = 1
        reader = csv.reader(file, delimiter=start.delimiter, skipinitialspace=start.skip_spaces, strict=True)
        names = list(layout.header) if layout.header else _names(reader, path, layout, notes)
        number = 0
        while True:
            first_line = reader.line_num + 1 + before
            try:
                cells = next(reader, None)
            except csv.Error as error:
                number += 1
                reason = f"broken CSV in lines {first_line} to {reader.line_num + before}: {error}"
                yield number, Unreadable(reason, kind="broken CSV")
                continue
            if cells is None:
                return
            if not cells:  # a blank line
                continue
            number += 1
            if len(cells) > len(names) and not any(cells[len(names) :]):
                del cells[len(names) :]
                notes[TRIMMED] += 1
            if len(cells) != len(names):
                has = "`header` names" if layout.header else "the header has"
                reason = f"{len(cells)} cells at line {first_line}, {has} {len(names)}"
                yield number, Unreadable(reason, start.delimiter.join(cells)[:MAX_RAW], "cells unlike the header")
            else:
                yield number, dict(zip(names, cells, strict=True))


def _names(reader: Iterator[list[str]], path: Path, layout: Layout, notes: Counter[str]) -> list[str]:
    """The names of the columns, from the first line that isn't blank."""
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise UserError(f"{path}: the header can't be read: {error}") from error
    names = [cell.strip() for cell in header]
    while names and not names[-1]:
        names.pop()
    check_names(names, path, layout, notes)
    refuse_repeated(names, path)
    if any(name != cell for name, cell in zip(names, header, strict=False)):
        notes["names of columns are taken without the spaces around them"] = 1
    return names


def refuse_repeated(names: list[str], path: Path) -> None:
    """Raise UserError where two columns have one name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: the header names the column '{repeated[0]}' more than once")


def check_names(names: list[str], path: Path, layout: Layout, notes: Counter[str]) -> None:
    """Raise UserError where the first line can't be the columns' names, and note where it may not be."""
    named = set(names).intersection(layout.columns)
    likely = [_is_name(name) for name in names if name]
    if named or all(likely):
        return
    shown = ", ".join(f'"{name[:60]}"' for name in names[:4])
    remedy = f"name the columns in their order: `header: [{', '.join(['question', 'answer', 'more'][: len(names)])}]`"
    if not any(likely):
        raise UserError(f"{path}: has no header: its first line ({shown}) looks like a row. If it is one, {remedy}")
    notes[f"the first line ({shown}) is taken as the names of columns; if it is a row, {remedy}"] = 1


def _is_name(cell: str) -> bool:
    """Whether a header's cell looks like a column's name: a few words, no number and no sentence."""
    return (
        0 < len(cell) <= 40
        and len(cell.split()) <= 3
        and cell[-1] not in ".?!"
        and NUMBER.fullmatch(cell) is None
        and any(map(str.isalpha, cell))
    )


def _look(sample: str, layout: Layout) -> _Start:
    """Tell a file's delimiter from its beginning: the configured one, that of a `sep=` line, or the one that fits."""
    first, _, rest = sample.lstrip("\ufeff").partition("\n")
    sep = SEP_LINE.fullmatch(first.rstrip("\r"))
    sample = rest if sep else sample
    default = "\t" if layout.format == "tsv" else ","
    delimiter = layout.delimiter or (sep[1] if sep else None) or _fitting(sample, default)
    spaced = f'{delimiter} "' in sample and _fit(sample, delimiter, True) > _fit(sample, delimiter, False)
    spaced = spaced or _spaced(sample, delimiter)
    return _Start(sep is not None, delimiter, spaced)


def _spaced(sample: str, delimiter: str) -> bool:
    """Whether a space follows every delimiter of a sample, so that it belongs to the delimiter."""
    try:
        rows = list(csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter))
    except csv.Error:
        return False
    cells = [cell for row in rows for cell in row[1:] if cell]
    return len(rows) > SPACED_ROWS and all(cell.startswith(" ") and not cell.startswith("  ") for cell in cells)


def _fitting(sample: str, default: str) -> str:
    """The delimiter that divides the header and most rows alike; of several as good, the default."""
    others = [delimiter for delimiter in DELIMITERS if delimiter != default]
    fits = {delimiter: _fit(sample, delimiter, False) for delimiter in [default, *others]}
    best = max(fits, key=lambda delimiter: fits[delimiter])
    return best if fits[best] >= 0.5 else default


def _fit(sample: str, delimiter: str, skip_spaces: bool) -> float:
    """The share of a sample's rows with as many cells as its header; 0 where that has only one."""
    if len(sample) > SAMPLE // 2:  # the last line is cut
        sample = sample.rpartition("\n")[0] or sample
    lines = io.StringIO(sample, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skip_spaces, strict=True)
    header, rows, alike = 0, 0, 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = [""]
        if cells is None:
            return 0.0 if header < 2 else (alike / rows if rows else 1.0)
        filled = max((place for place, cell in enumerate(cells, 1) if cell.strip()), default=0)
        if not header:
            header = filled
        elif cells:
            rows += 1
            alike += filled <= header <= len(cells)
