"""Spreadsheets as Excel and LibreOffice write them, in as few parts as their formats ask for."""

import zipfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from xml.sax.saxutils import escape

Cell = str | int | float | bool | date | None
Sheets = Mapping[str, Sequence[Sequence[Cell]]]
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
ODF = "urn:oasis:names:tc:opendocument:xmlns"


def write_xlsx(path: Path, sheets: Sheets, merged: Sequence[str] = ()) -> Path:
    """Write a workbook; merged: ranges of the first sheet, such as "A2:A4"."""
    names = list(sheets)
    numbers = range(1, len(names) + 1)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" ContentType="application/'
            'vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType="application/'
            'vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/></Types>',
        )
        file.writestr("_rels/.rels", _relations(("officeDocument", "xl/workbook.xml")))
        entries = "".join(f'<sheet name="{escape(names[n - 1])}" sheetId="{n}" r:id="rId{n}"/>' for n in numbers)
        file.writestr(
            "xl/workbook.xml", f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{entries}</sheets></workbook>'
        )
        file.writestr(
            "xl/_rels/workbook.xml.rels", _relations(*(("worksheet", f"worksheets/sheet{n}.xml") for n in numbers))
        )
        for number, rows in zip(numbers, sheets.values(), strict=True):
            cells = "".join(
                f'<row r="{r}">{"".join(_excel_cell(cell, _place(r, c)) for c, cell in enumerate(row))}</row>'
                for r, row in enumerate(rows, 1)
            )
            joined = "".join(f'<mergeCell ref="{one}"/>' for one in merged) if number == 1 else ""
            joined = f"<mergeCells>{joined}</mergeCells>" if joined else ""
            sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{cells}</sheetData>{joined}</worksheet>'
            file.writestr(f"xl/worksheets/sheet{number}.xml", sheet)
    return path


def write_ods(path: Path, sheets: Sheets) -> Path:
    """Write an OpenDocument spreadsheet."""
    tables = "".join(
        f'<table:table table:name="{escape(name)}">'
        + "".join(f"<table:table-row>{''.join(map(_open_cell, row))}</table:table-row>" for row in rows)
        + "</table:table>"
        for name, rows in sheets.items()
    )
    spaces = " ".join(f'xmlns:{name}="{ODF}:{name}:1.0"' for name in ("office", "table", "text"))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        file.writestr("META-INF/manifest.xml", f'<manifest:manifest xmlns:manifest="{ODF}:manifest:1.0"/>')
        file.writestr(
            "content.xml",
            f"<office:document-content {spaces}><office:body><office:spreadsheet>{tables}</office:spreadsheet>"
            "</office:body></office:document-content>",
        )
    return path


def _relations(*targets: tuple[str, str]) -> str:
    entries = "".join(
        f'<Relationship Id="rId{n}" Type="{OFFICE}/{kind}" Target="{target}"/>'
        for n, (kind, target) in enumerate(targets, 1)
    )
    return f'<Relationships xmlns="{PACKAGE}/relationships">{entries}</Relationships>'


def _place(row: int, column: int) -> str:
    return f"{chr(65 + column)}{row}"


def _excel_cell(cell: Cell, place: str) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return f'<c r="{place}" t="b"><v>{int(cell)}</v></c>'
    if isinstance(cell, date):
        return f'<c r="{place}" t="d"><v>{cell.isoformat()}</v></c>'
    if isinstance(cell, str):
        return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{escape(cell)}</t></is></c>'
    return f'<c r="{place}"><v>{cell}</v></c>'


def _open_cell(cell: Cell) -> str:
    if cell is None:
        return "<table:table-cell/>"
    if isinstance(cell, bool):
        return f'<table:table-cell office:value-type="boolean" office:boolean-value="{str(cell).lower()}"/>'
    if isinstance(cell, date):
        return f'<table:table-cell office:value-type="date" office:date-value="{cell.isoformat()}"/>'
    if isinstance(cell, str):
        return f'<table:table-cell office:value-type="string"><text:p>{escape(cell)}</text:p></table:table-cell>'
    return f'<table:table-cell office:value-type="float" office:value="{cell}"/>'
