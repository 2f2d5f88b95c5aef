"""CSV as spreadsheets and scripts write it: every row in the count, and nothing in another column than it stood in."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.core.errors import UserError
from data_stages import data, read, write_rows
from examples import examples

ROWS = [{"question": f"Wie viel, {n}?", "answer": f"{n},5 | so"} for n in range(300)]


def _write(path, rows, delimiter, first="", **choices):
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(first)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **choices)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize(("delimiter", "name"), [(",", "commas"), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_the_delimiter_is_told_from_the_file_and_said(tmp_path, delimiter, name, quoting, ending):
    _write(tmp_path / f"rows.{ending}", ROWS, delimiter, quoting=quoting)
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / f"rows.{ending}")}])
    assert data(records) == ROWS
    said = any(name in note for note in entries[0].get("notes", []))
    assert said == (delimiter != (",\t"[ending == "tsv"]))


@pytest.mark.parametrize("delimiter", [";", ",", "\t", "^"])
@pytest.mark.parametrize("start", ["sep={}\r\n", '"sep={}"\n', "\ufeffsep={}\n"])
def test_a_first_line_that_names_the_delimiter_is_no_header(tmp_path, delimiter, start):
    path = tmp_path / "rows.csv"
    _write(path, ROWS, delimiter, first=start.format(delimiter))
    assert [row for _, row in read(path)] == ROWS
    with path.open("a") as file:
        file.write("only one\n")
    assert read(path)[-1][1].reason == "1 cells at line 303, the header has 2"


def test_the_delimiter_is_told_whatever_line_ends_stand_within_cells(tmp_path):
    rows = [{"question": f"a\u2028b\n,{n}", "answer": "\x0b;c"} for n in range(9000)]
    _write(tmp_path / "rows.csv", rows, ";")
    assert [row for _, row in read(tmp_path / "rows.csv")] == rows
    (tmp_path / "old.csv").write_bytes(b"a;b\r1,2;3\r4;5,6\r")
    assert [row for _, row in read(tmp_path / "old.csv")] == [{"a": "1,2", "b": "3"}, {"a": "4", "b": "5,6"}]


def test_a_delimiter_may_be_named(tmp_path):
    (tmp_path / "rows.csv").write_text("a~b\n1,5~2\n")
    assert read(tmp_path / "rows.csv", delimiter="~") == [(1, {"a": "1,5", "b": "2"})]
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: `delimiter` is for CSV files, and this one is read as jsonl"):
        read(tmp_path / "rows.jsonl", delimiter="~")


def test_commas_stay_where_they_fit_better_and_where_nothing_fits(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\na;b;c,d;e\nf;g,h\n")
    assert [row for _, row in read(tmp_path / "rows.csv")] == [
        {"question": "a;b;c", "answer": "d;e"},
        {"question": "f;g", "answer": "h"},
    ]
    (tmp_path / "rows.csv").write_text("text\na; b\n\nc\n")
    assert [row for _, row in read(tmp_path / "rows.csv")] == [{"text": "a; b"}, {"text": "c"}]


@pytest.mark.parametrize("text", [" question , answer \n a , b\n", "\n\nquestion\t;answer\n a ; b\n"])
def test_names_are_stripped_of_spaces_and_cells_are_not(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / "rows.csv")}])
    assert data(records) == [{"question": " a ", "answer": " b"}]
    assert any("without the spaces" in note for note in entries[0]["notes"])


def test_quotes_after_spaces_are_quotes(tmp_path):
    (tmp_path / "rows.csv").write_text('question, answer\n"one, two", "three, four"\n"five", six\n')
    assert [row for _, row in read(tmp_path / "rows.csv")] == [
        {"question": "one, two", "answer": "three, four"},
        {"question": "five", "answer": "six"},
    ]


@pytest.mark.parametrize("header", ["question,answer", "question,answer,", "question,answer,,"])
def test_empty_cells_after_the_last_column_are_left_out_and_full_ones_are_not(tmp_path, header):
    (tmp_path / "rows.csv").write_text(f"{header}\na,b,\nc,d\ne,,,\nf,g,h\n")
    summary, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / "rows.csv")}])
    assert data(records) == [{"question": q, "answer": a} for q, a in (("a", "b"), ("c", "d"), ("e", ""))]
    assert records[3]["error"] == "3 cells at line 5, the header has 2" and summary["rows"] == 4
    assert "rows have empty cells after their last column, which are left out (2)" in entries[0]["notes"]


@pytest.mark.parametrize("first", ["What is 2+2?,4", "Add 2 and 3 to it,5", '"Is it so? Yes.",', "1,2", "4,4"])
def test_a_file_without_a_header_is_refused_until_its_columns_are_named(tmp_path, first):
    path = tmp_path / "rows.csv"
    path.write_text(f"{first}\nWhat is 3+3?,6\n")
    with pytest.raises(UserError, match=r"rows\.csv: has no header: its first line \(.*`header: \[question"):
        read(path)
    found = read(path, header=["question", "answer"])
    assert len(found) == 2 and found[1] == (2, {"question": "What is 3+3?", "answer": "6"})
    if first == "What is 2+2?,4":
        assert read(path, columns={"question": "What is 2+2?", "answer": "4"})[0][1]["4"] == "6"


def test_a_doubtful_header_is_said(tmp_path):
    (tmp_path / "rows.csv").write_text("What is it?,tree\nAnd that?,house\n")
    _, _, entries, _, shown = write_rows(tmp_path / "data", [{"path": str(tmp_path / "rows.csv")}])
    assert entries[0]["rows"] == 1
    assert 'the first line ("What is it?", "tree") is taken as the names of columns; if it is a row, name' in shown


@examples(60)
@given(
    cells=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1)] * 3), min_size=1),
    delimiter=st.sampled_from(",;\t|"),
)
def test_any_cells_come_back(tmp_path_factory, cells, delimiter):
    path = tmp_path_factory.mktemp("cells") / "rows.csv"
    rows = [dict(zip(("one", "two", "three"), row, strict=True)) for row in cells]
    _write(path, rows, delimiter, quoting=csv.QUOTE_ALL)
    assert [row for _, row in read(path)] == rows


def test_csv_quotes_newlines_and_broken_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('q,a\n"one, ""two""\nthree",x\n\nonly\n1,2,3\ny,z\n"never closed,w\nmore,lines\n')
    found = read(path)
    assert found[0] == (1, {"q": 'one, "two"\nthree', "a": "x"})
    assert found[1][1].reason == "1 cells at line 5, the header has 2"
    assert found[2][1].reason == "3 cells at line 6, the header has 2"
    assert found[3] == (4, {"q": "y", "a": "z"})
    assert found[4][0] == 5 and "lines 8 to 9" in found[4][1].reason
    assert len(found) == 5


def test_csv_with_a_repeated_column_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match="column 'a' more than once"):
        read(tmp_path / "rows.csv")


def test_tab_separated_file(tmp_path):
    (tmp_path / "rows.tsv").write_text("q\ta\nx, y\tz\n")
    assert read(tmp_path / "rows.tsv") == [(1, {"q": "x, y", "a": "z"})]


def test_a_quote_that_is_never_closed_does_not_swallow_a_file_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("adder.data.csv_rows.MAX_CELL", 100)
    (tmp_path / "rows.csv").write_text('a,b\n"open,1\n' + "x,y\n" * 200)
    limit = csv.field_size_limit()
    try:
        found = read(tmp_path / "rows.csv")
    finally:
        csv.field_size_limit(limit)  # it is the whole process's
    assert "field larger than field limit" in found[0][1].reason
    assert found[-1][1] == {"a": "x", "b": "y"} and len(found) > 150


def test_a_space_behind_every_comma_is_no_part_of_the_cells(tmp_path):
    (tmp_path / "a.csv").write_text('question, answer\nWhat is it, "a, b"\nWho, Bob\nWhy, so\n')
    _, records, entries, *_ = write_rows(tmp_path / "a", [{"path": str(tmp_path / "a.csv")}])
    assert [row["answer"] for row in data(records)] == ["a, b", "Bob", "so"]
    assert "spaces behind what separates the cells are left out" in entries[0]["notes"]
    (tmp_path / "b.csv").write_text("question, answer\nWhat is it, a\nWho,Bob\nWhy, so\n")
    assert [row["answer"] for _, row in read(tmp_path / "b.csv")] == [" a", "Bob", " so"]
