"""Sheets of spreadsheets: the named one or the only one, with the values that its cells show."""

import gzip
from datetime import date

import pytest

from adder.core.errors import UserError
from data_stages import data, read, write_rows
from spreadsheets import write_ods, write_xls, write_xlsb, write_xlsx

SHEET = [
    ["Question", " answer ", "stars", "seen", "day"],
    ["Wie groß?\nSehr?", "4 < 5", 3, True, date(2024, 5, 3)],
    [None, None, None, None, None],
    ["What?", "  two ", 0.5, None, None],
]
ROWS = [
    {"Question": "Wie groß?\nSehr?", "answer": "4 < 5", "stars": 3, "seen": True, "day": "2024-05-03"},
    {"Question": "What?", "answer": "  two ", "stars": 0.5, "seen": None, "day": None},
]


def made(tmp_path, ending, sheets, **how):
    path = tmp_path / f"rows{ending}"
    write = {".ods": write_ods, ".xls": write_xls, ".xlsb": write_xlsb}.get(ending, write_xlsx)
    return write(path, sheets, **how)


@pytest.mark.parametrize("ending", [".xlsx", ".ods", ".xlsm", ".xls", ".xlsb"])
def test_the_only_sheet_is_read_with_its_values(tmp_path, ending):
    sheet = [
        row if ending != ".ods" else [cell if cell != "Wie groß?\nSehr?" else "Wie groß?" for cell in row]
        for row in SHEET
    ]
    path = made(tmp_path, ending, {"Tabelle 1": sheet, "empty": []})
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    expected = [
        {**row, "Question": row["Question"].replace("\nSehr?", "" if ending == ".ods" else "\nSehr?")} for row in ROWS
    ]
    assert data(records) == expected
    assert [record["row"] for record in records] == [1, 2] and entries[0]["kind"] == "spreadsheet"
    assert "names of columns" not in str(entries[0].get("notes"))
    (tmp_path / f"b{ending}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [row["Question"] for _, row in read(tmp_path / f"b{ending}.gz")] == [row["Question"] for row in expected]


@pytest.mark.parametrize("ending", [".xlsx", ".ods", ".xls", ".xlsb"])
def test_one_of_several_sheets_must_be_named(tmp_path, ending):
    path = made(tmp_path, ending, {"a": SHEET, "b": SHEET[:2], "c": []})
    with pytest.raises(UserError, match=r"2 of its sheets hold anything; name one by `table:` \(a, b, c\)"):
        read(path)
    assert len(read(path, table="b")) == 1
    with pytest.raises(UserError, match="has no sheet 'd'; its sheets: a, b, c"):
        read(path, table="d")
    with pytest.raises(UserError, match="no of its sheets hold anything"):
        read(made(tmp_path, ending, {"c": []}))


@pytest.mark.parametrize("ending", [".xlsx", ".ods", ".xls", ".xlsb"])
def test_columns_without_a_name_and_tables_that_begin_elsewhere(tmp_path, ending):
    rows = [[None] * 4, [None, "question", None, "answer"], [None, "q", None, "a"], ["note", "q", None, "b"]]
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(made(tmp_path, ending, {"a": rows}))}])
    assert records[0]["data"] == {"question": "q", "answer": "a"}
    assert records[1]["error"] == "a value in a column without a name, in row 4 of the sheet"
    assert records[1]["kind"] == "cells unlike the header" and "note; q" in records[1]["raw"]


@pytest.mark.parametrize("ending", [".xlsx", ".xls"])
def test_merged_cells_have_their_value_in_each_row(tmp_path, ending):
    rows = [["context", "question", "answer"], ["c", "q1", "a1"], [None, "q2", "a2"], ["d", "q3", "a3"]]
    path = made(tmp_path, ending, {"a": rows}, merged=["A2:A3"])
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert [row["context"] for row in data(records)] == ["c", "c", "d"]
    assert entries[0]["notes"] == ["cells that are merged have their value in each of their rows"]


def test_a_sheet_without_a_header_is_refused_until_it_is_named(tmp_path):
    rows = [["What is the height of the tower?", "324"], ["Who built it, and when was that?", "Eiffel."]]
    path = write_xlsx(tmp_path / "a.xlsx", {"a": rows})
    with pytest.raises(UserError, match=r"has no header.*`header: \[question, answer\]`"):
        read(path)
    assert [row["answer"] for _, row in read(path, header=["question", "answer"])] == ["324", "Eiffel."]
    write_xlsx(path, {"a": [["question", "question"], ["a", "b"]]})
    with pytest.raises(UserError, match="names the column 'question' more than once"):
        read(path)


def test_what_is_no_spreadsheet_is_refused_by_name(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"question,answer\n")
    with pytest.raises(UserError, match=r"a\.xlsx: can't be read as a spreadsheet"):
        read(tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(UserError, match="`table` is for SQLite files and spreadsheets"):
        read(tmp_path / "a.csv", table="a")
