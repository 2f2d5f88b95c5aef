"""Every format, encoding and compression gives the same rows; what can't be read is named."""

import json

import pyarrow as pa
import pytest

from adder.core.errors import UserError
from adder.data.row_types import Unreadable
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


@pytest.mark.parametrize(
    ("encoding", "remedy"),
    [
        ("cp1252", r"probably Windows' `encoding: cp1252`, in which it reads: Grüße – an €,ja"),
        ("utf-16", "`encoding: utf-16`"),
        ("utf-16-le", "`encoding: utf-16-le`"),
        ("utf-16-be", "`encoding: utf-16-be`"),
    ],
)
def test_another_encoding_is_named_with_its_remedy(tmp_path, encoding, remedy):
    path = tmp_path / "rows.csv"
    path.write_bytes("question,answer\nGrüße – an €,ja\n".encode(encoding))
    with pytest.raises(UserError, match=remedy):
        read(path)
    assert read(path, encoding=encoding) == [(1, {"question": "Grüße – an €", "answer": "ja"})]


def test_file_that_ends_within_a_character_is_a_wrong_encoding(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"a\nx\xc3")
    with pytest.raises(UserError, match=r"byte 3 \(0xc3\)"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize("encoding", ["klingon", "base64"])
def test_unknown_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "rows.csv").write_text("a\nb\n")
    with pytest.raises(UserError, match=f"encoding: {encoding}"):
        read(tmp_path / "rows.csv", encoding=encoding)


def test_unknown_ending_says_what_to_set(tmp_path):
    (tmp_path / "rows.dat").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"'\.dat'.*`format:`"):
        read(tmp_path / "rows.dat")
    assert read(tmp_path / "rows.dat", format="jsonl") == [(1, {"a": 1})]


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


@pytest.mark.parametrize(
    ("ending", "remedy"),
    [("numbers", "export it as CSV"), ("pdf.gz", "turn it into text"), ("pkl", "save the table as Parquet")],
)
def test_a_file_that_nothing_reads_is_refused_with_what_to_do(tmp_path, ending, remedy):
    (tmp_path / f"rows.{ending}").write_bytes(b"PK")
    with pytest.raises(UserError, match=f"files aren't read; {remedy}"):
        read(tmp_path / f"rows.{ending}")


def test_old_line_ends_end_a_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a":1}\r{"a":2}\r\n\r\n{"a":\n3}')
    found = read(tmp_path / "rows.jsonl")
    assert [number for number, _ in found] == [1, 2, 4, 5]
    assert [row for _, row in found[:2]] == [{"a": 1}, {"a": 2}]


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


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("rows", [GREETINGS, GREETINGS[:1], {"data": GREETINGS}])
def test_one_json_value_among_json_lines_is_named_with_its_remedy(tmp_path, rows, indent):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows, indent=indent))
    if isinstance(rows, dict) and indent is None:  # which is a row, if a strange one
        assert read(path) == [(1, rows)]
        return
    found = [row for _, row in read(path)]
    unreadable = [row for row in found if isinstance(row, Unreadable)]
    assert found[0] in unreadable and all("set `format: json`" in row.reason for row in unreadable)
    shown = write_rows(tmp_path / "data", [{"path": str(path)}]).shown
    assert "set `format: json`" in shown
    assert [row for _, row in read(path, format="json")] == GREETINGS[
        : len(rows if isinstance(rows, list) else GREETINGS)
    ]


def test_a_broken_first_line_is_no_reason_to_speak_of_other_formats(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": \n{"a": 1}\n[1]\n')
    found = [row for _, row in read(tmp_path / "rows.jsonl")]
    assert found[1] == {"a": 1} and not any("format" in row.reason for row in (found[0], found[2]))
    assert [found[0].kind, found[2].kind] == ["broken JSON", "not an object"]


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "shift_jis", "gb18030"])
def test_bytes_that_speak_for_no_western_encoding_are_not_said_to_be_one(tmp_path, encoding):
    text = "сколько это стоит" if encoding in ("cp1251", "koi8-r") else "日本語 漢字 一二三"
    (tmp_path / "a.csv").write_bytes(f"question,answer\n{text},{text}\n".encode(encoding))
    with pytest.raises(UserError, match=r"Set `encoding:` .* for example (cp1251, gb18030|latin-1, utf-16)"):
        read(tmp_path / "a.csv")


def test_lines_that_are_lists_of_messages_are_told_from_one_list_of_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"role": "user", "content": "q"}]\n' * 2)
    found = [row for _, row in read(tmp_path / "a.jsonl")]
    assert all('write it as {"messages": [...]}' in row.reason for row in found)


def test_lines_that_end_in_commas_or_hold_several_rows_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "}{"},\n{"a": 2},\n')
    assert all("; the line ends in a comma: remove these" in row.reason for _, row in read(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"a": "}{"}{"a": 2}\n')
    assert "; several rows stand on one line: set `format: json`" in read(tmp_path / "b.jsonl")[0][1].reason
    assert read(tmp_path / "b.jsonl", format="json") == [(1, {"a": "}{"}), (2, {"a": 2})]


def test_json_values_that_follow_one_another_are_rows(tmp_path):
    rows = [{"a": number, "b": [{"c": "}\n{"}]} for number in range(3)]
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    assert [row for _, row in read(tmp_path / "a.json")] == rows
    (tmp_path / "b.json").write_text(json.dumps(rows[0], indent=2) + "\n]")
    with pytest.raises(UserError, match=r"b\.json: broken JSON at line 9, column 1"):
        read(tmp_path / "b.json")
