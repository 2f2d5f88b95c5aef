"""Spreadsheets as Excel and LibreOffice write them, in as few parts as their formats ask for."""

import struct
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


def write_xls(path: Path, sheets: Sheets, merged: Sequence[str] = ()) -> Path:
    """Write a workbook as Excel 97 to 2003 do: BIFF8 records ([MS-XLS]) in a compound file ([MS-CFB]).

    merged: ranges of the first sheet. Dates are written as text: a format of cells would be needed to tell them.
    """
    ends = record(0x0A, b"")
    bodies = [_biff_sheet(rows, merged if not number else ()) for number, rows in enumerate(sheets.values())]
    start = _biff_begin(0x0005)
    entries = [
        struct.pack("<BB", 0, 0) + struct.pack("<BB", len(name), 1) + name.encode("utf-16-le") for name in sheets
    ]
    place = len(start) + sum(len(entry) + 8 for entry in entries) + len(ends)  # 8: a record's head and its place
    stream = start
    for entry, body in zip(entries, bodies, strict=True):
        stream += record(0x85, struct.pack("<I", place) + entry)
        place += len(body)
    path.write_bytes(_compound(stream + ends + b"".join(bodies)))
    return path


def record(kind: int, content: bytes) -> bytes:
    """A record of BIFF8."""
    return struct.pack("<HH", kind, len(content)) + content


def write_xlsb(path: Path, sheets: Sheets) -> Path:
    """Write a binary workbook ([MS-XLSB]); dates as text."""
    names = list(sheets)
    book = _binary(131) + _binary(143)
    for number, name in enumerate(names, 1):
        book += _binary(156, struct.pack("<II", 0, number) + _wide(f"rId{number}") + _wide(name))
    book += _binary(144) + _binary(132)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" ContentType="application/'
            'vnd.openxmlformats-package.relationships+xml"/><Default Extension="bin" ContentType="application/'
            'vnd.ms-excel.sheet.binary.macroEnabled.main"/></Types>',
        )
        file.writestr("_rels/.rels", _relations(("officeDocument", "xl/workbook.bin")))
        targets = [("worksheet", f"worksheets/sheet{number}.bin") for number in range(1, len(names) + 1)]
        file.writestr("xl/_rels/workbook.bin.rels", _relations(*targets))
        file.writestr("xl/workbook.bin", book)
        for number, rows in enumerate(sheets.values(), 1):
            file.writestr(f"xl/worksheets/sheet{number}.bin", _binary_sheet(rows))
    return path


def _biff_begin(kind: int) -> bytes:
    return record(0x0809, struct.pack("<HHHHII", 0x0600, kind, 0x0DBB, 0x07CC, 0, 6))


def _biff_sheet(rows: Sequence[Sequence[Cell]], merged: Sequence[str]) -> bytes:
    width = max((len(row) for row in rows), default=0)
    body = _biff_begin(0x0010) + record(0x0200, struct.pack("<IIHHH", 0, len(rows), 0, width, 0))
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            place = struct.pack("<HHH", r, c, 0)
            if isinstance(cell, bool):
                body += record(0x0205, place + struct.pack("<BB", cell, 0))
            elif isinstance(cell, int | float):
                body += record(0x0203, place + struct.pack("<d", cell))
            elif cell is not None:
                text = str(cell)
                body += record(0x0204, place + struct.pack("<HB", len(text), 1) + text.encode("utf-16-le"))
    corners = [[_corner(corner) for corner in one.split(":")] for one in merged]
    if corners:
        ranges = [struct.pack("<HHHH", top, bottom, left, right) for (top, left), (bottom, right) in corners]
        body += record(0xE5, struct.pack("<H", len(ranges)) + b"".join(ranges))
    return body + record(0x0A, b"")


def _corner(place: str) -> tuple[int, int]:
    return int(place[1:]) - 1, ord(place[0]) - 65


def _compound(stream: bytes) -> bytes:
    """A compound file with the one stream "Workbook": header, its table of sectors, its directory, the stream."""
    free, end, table = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
    size = max(4096, -(-len(stream) // 512) * 512)  # shorter streams would stand in smaller sectors
    sectors = size // 512
    assert sectors <= 126, "one sector of the table tells of 128"
    chain = [table, end, *range(3, sectors + 2), end]
    header = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(16)
    header += struct.pack("<HHHHH6xIIIIIIIII", 0x3E, 3, 0xFFFE, 9, 6, 0, 1, 1, 0, 4096, end, 0, end, 0)
    header += struct.pack("<109I", 0, *[free] * 108)

    def entry(name: str, kind: int, child: int, first: int, length: int) -> bytes:
        named = (name + "\0").encode("utf-16-le")
        return named.ljust(64, b"\0") + struct.pack(
            "<HBBIII16xI16xIQ", len(named), kind, 1, free, free, child, 0, first, length
        )

    directory = entry("Root Entry", 5, 1, end, 0) + entry("Workbook", 2, free, 2, size)
    sectors_table = struct.pack("<128I", *chain, *[free] * (128 - len(chain)))
    return header + sectors_table + directory.ljust(512, b"\0") + stream.ljust(size, b"\0")


def _binary_sheet(rows: Sequence[Sequence[Cell]]) -> bytes:
    width = max((len(row) for row in rows), default=0)
    corners = struct.pack("<IIII", 0, max(len(rows) - 1, 0), 0, max(width - 1, 0))
    body = _binary(129) + _binary(148, corners) + _binary(145)
    for r, row in enumerate(rows):
        body += _binary(0, struct.pack("<I", r) + bytes(21))
        for c, cell in enumerate(row):
            place = struct.pack("<II", c, 0)
            if isinstance(cell, bool):
                body += _binary(4, place + struct.pack("<B", cell))
            elif isinstance(cell, int | float):
                body += _binary(5, place + struct.pack("<d", cell))
            elif cell is not None:
                body += _binary(6, place + _wide(str(cell)))
    return body + _binary(146) + _binary(130)


def _binary(kind: int, content: bytes = b"") -> bytes:
    """A record: its kind and its length in groups of seven bits, and what it holds."""
    head = bytes([kind]) if kind < 128 else bytes([kind & 0x7F | 0x80, kind >> 7])
    length, size = b"", len(content)
    while True:
        length += bytes([size & 0x7F | (0x80 if size > 127 else 0)])
        size >>= 7
        if not size:
            return head + length + content


def _wide(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode("utf-16-le")
