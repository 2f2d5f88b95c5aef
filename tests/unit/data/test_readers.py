"""Every format, encoding and compression gives the same rows; what can't be read is named."""

import csv
import json

import pyarrow as pa
import pytest

from adder.core.errors import UserError
from data_stages import GREETINGS, read, write_rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_text_formats_and_encodings_give_the_same_rows(tmp_path, ending, encoding):
    text = {
        "json": json.dumps(GREETINGS, ensure_ascii=False, indent=1),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in GREETINGS),
        "csv": "question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in GREETINGS),
    }[ending]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(text.encode(encoding))
    told = "utf-8" if encoding.startswith("utf-8") else encoding
    assert read(path, encoding=told) == [(1, GREETINGS[0]), (2, GREETINGS[1])]


def test_wrong_encoding_names_the_byte_even_far_into_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    start = b"\xef\xbb\xbf" + b'{"a": "' + "é".encode() * 700_000
    path.write_bytes(start + b'\xe9"}\n')
    with pytest.raises(UserError, match=rf"rows\.jsonl: byte {len(start)} \(0xe9\) is not valid utf-8.*`encoding:`"):
        read(path)
    assert len(read(path, encoding="latin-1")) == 1


def test_file_that_ends_within_a_character_is_a_wrong_encoding(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"a\nx\xc3")
    with pytest.raises(UserError, match=r"byte 3 \(0xc3\)"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize("encoding", ["klingon", "base64"])
def test_unknown_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "rows.csv").write_text("a\nb\n")
    with pytest.raises(UserError, match=f"encoding: {encoding}"):
        read(tmp_path / "rows.csv", encoding=encoding)


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


def test_unknown_ending_says_what_to_set(tmp_path):
    (tmp_path / "rows.txt").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"'\.txt'.*`format:`"):
        read(tmp_path / "rows.txt")
    assert read(tmp_path / "rows.txt", format="jsonl") == [(1, {"a": 1})]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "arrow"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, ending, compression):
    table = pa.Table.from_pylist([{"q": "Grüße", "a": "1"}, {"q": "two", "a": "2"}])
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode(),
        "json": json.dumps(table.to_pylist()).encode(),
        "csv": "\ufeffq,a\nGrüße,1\ntwo,2\n".encode(),
        "tsv": "q\ta\nGrüße\t1\ntwo\t2\n".encode(),
        "arrow": stream.getvalue().to_pybytes(),
    }[ending]
    path = tmp_path / f"rows.{ending}.{'gz' if compression == 'gzip' else 'zst'}"
    with pa.CompressedOutputStream(str(path), compression) as file:
        file.write(content)
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert [record["data"] for record in records] == table.to_pylist()
    assert (entries[0]["name"], entries[0]["kind"]) == ("rows", ending)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"rows.*: can't be read"):
        read(path)


def test_old_line_ends_end_a_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a":1}\r{"a":2}\r\n\r\n{"a":\n3}')
    found = read(tmp_path / "rows.jsonl")
    assert [number for number, _ in found] == [1, 2, 4, 5]
    assert [row for _, row in found[:2]] == [{"a": 1}, {"a": 2}]


def test_a_quote_that_is_never_closed_does_not_swallow_a_file_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("adder.data.readers.MAX_CELL", 100)
    (tmp_path / "rows.csv").write_text('a,b\n"open,1\n' + "x,y\n" * 200)
    limit = csv.field_size_limit()
    try:
        found = read(tmp_path / "rows.csv")
    finally:
        csv.field_size_limit(limit)  # it is the whole process's
    assert "field larger than field limit" in found[0][1].reason
    assert found[-1][1] == {"a": "x", "b": "y"} and len(found) > 150


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in GREETINGS))
    assert [row for _, row in read(path)] == GREETINGS


@pytest.mark.parametrize("text", ['"just text"', '{"a": 1}', "3"])
def test_a_json_file_without_rows_is_named(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json: expected a list of objects"):
        read(tmp_path / "rows.json")


def test_broken_json_file_names_line_and_column(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(UserError, match=r"rows\.json: broken JSON at line 3, column 7"):
        read(tmp_path / "rows.json")
