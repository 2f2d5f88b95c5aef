"""The rows of one sheet of a spreadsheet: Excel's .xlsx, .xlsm, .xlsb and .xls, and .ods."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from adder.core.errors import UserError
from adder.data import csv_rows
from adder.data.compression import bare_name, uncompressed
from adder.data.row_types import MAX_RAW, Layout, Row, Unreadable

MERGED = "cells that are merged have their value in each of their rows"


def rows(path: Path, layout: Layout, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of the sheet `layout.table`, or of the only one that holds anything.

    The first row that isn't blank has the names; blank rows and columns without a name and a value are left out. Whole
    numbers are integers, empty cells null, and of formulas the value is read that was saved. A row with a value in a
    column without a name is unreadable. Raises UserError where the sheet isn't told or isn't there, where its first
    row is no header, or where the file can't be read.
    """
    import python_calamine

    # What is compressed here is the file as a whole: .xlsx and .ods are zips themselves.
    opened = nullcontext(path) if bare_name(path) == path.name else uncompressed(path)
    try:
        with opened as plain, python_calamine.CalamineWorkbook.from_path(plain) as book:
            sheet = book.get_sheet_by_name(_chosen(book, path, layout.table))
            cells = _merged_filled(sheet, notes)
    except python_calamine.PasswordError as error:
        raise UserError(f"{path}: is protected by a password; save it without one") from error
    except python_calamine.CalamineError as error:
        raise UserError(f"{path}: can't be read as a spreadsheet: {error}") from error
    yield from _named(cells, path, layout, notes)


def _chosen(book: Any, path: Path, wanted: str | None) -> str:
    """The sheet's name."""
    names: list[str] = book.sheet_names
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{path}: has no sheet '{wanted}'; its sheets: {', '.join(names)}")
        return wanted
    filled = [name for name in names if book.get_sheet_by_name(name).height]
    if len(filled) != 1:
        raise UserError(
            f"{path}: {len(filled) or 'no'} of its sheets hold anything; name one by `table:` ({', '.join(names)})"
        )
    return filled[0]


def _merged_filled(sheet: Any, notes: Counter[str]) -> list[list[Any]]:
    """All cells, those of merged ranges each with the range's value."""
    cells: list[list[Any]] = sheet.to_python(skip_empty_area=False)
    for (top, left), (bottom, right) in sheet.merged_cell_ranges or []:
        if bottom == top or top >= len(cells):
            continue  # over columns it is a heading
        value = cells[top][left]
        for row in cells[top : bottom + 1]:
            row[left : right + 1] = [value] * (min(right + 1, len(row)) - left)
        notes[MERGED] += 1
    return cells


def _named(
    cells: list[list[Any]], path: Path, layout: Layout, notes: Counter[str]
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    lines = ((line, row) for line, row in enumerate(cells, 1) if any(cell not in ("", None) for cell in row))
    if layout.header:
        names = list(layout.header)
    else:
        _, header = next(lines, (0, []))
        names = [str(cell).strip() for cell in header]
        csv_rows.check_names([name for name in names if name], path, layout, notes)
        csv_rows.refuse_repeated([name for name in names if name], path)
    for number, (line, row) in enumerate(lines, 1):
        values = [_value(cell) for cell in row]
        extra = [value for place, value in enumerate(values) if not names[place : place + 1] or not names[place]]
        if any(value is not None for value in extra):
            shown = "; ".join(str(value) for value in values if value is not None)
            reason = f"a value in a column without a name, in row {line} of the sheet"
            yield number, Unreadable(reason, shown[:MAX_RAW], "cells unlike the header")
            continue
        values += [None] * (len(names) - len(values))
        yield number, {name: value for name, value in zip(names, values, strict=False) if name}


def _value(cell: Any) -> Any:
    """The value of a cell: null for an empty one, a whole number as one."""
    if isinstance(cell, str):
        return cell if cell.strip() else None
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell
