"""Raw rows: every format, every encoding, and no row ever lost."""

import json
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adder import download, rows
from adder.errors import UserError
from adder.files import read_json, read_jsonl
from adder.progress import Progress


def source(path, **changes):
    defaults = {"format": "auto", "encoding": "utf-8", "convert": None, "limit": None, "sample": None, "license": None}
    return {"path": str(path), **defaults, **changes}


def read(path, **changes):
    """(row number, row) of one source."""
    own = source(path, **changes)
    named = [(str(n), file) for n, file in enumerate(rows.files_of(own))]
    return [(number, row) for _, number, row in rows.read_source(own, named)]


def run_data(tmp_path, sources, heldout=None):
    out = tmp_path / "data"
    out.mkdir()
    summary = download.run_data({"sources": sources, "heldout": {"sources": heldout}}, {}, out, Progress.silent())
    return summary, list(read_jsonl(out / "rows.jsonl")), read_json(out / "sources.json")


ROWS = [{"question": "Grüße?", "answer": "ja"}, {"question": "2+2\u2028?", "answer": "4"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_text_formats_and_encodings_give_the_same_rows(tmp_path, ending, encoding):
    text = {
        "json": json.dumps(ROWS, ensure_ascii=False, indent=1),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
        "csv": "question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in ROWS),
    }[ending]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(text.encode(encoding))
    told = "utf-8" if encoding.startswith("utf-8") else encoding
    assert read(path, encoding=told) == [(1, ROWS[0]), (2, ROWS[1])]


def test_parquet_rows_with_dates_and_nulls_reach_rows_jsonl(tmp_path):
    table = pa.table({"a": ["x", None], "day": [date(2024, 5, 3), None], "sum": [Decimal("1.50"), None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    _, records, entries = run_data(tmp_path, [source(tmp_path / "rows.parquet")])
    assert records[0]["data"] == {"a": "x", "day": "2024-05-03", "sum": "1.50"}
    assert records[1]["data"] == {"a": None, "day": None, "sum": None}
    assert entries[0]["kind"] == "parquet" and entries[0]["rows"] == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"data": ROWS, "version": "1"}, ROWS),
        ({"train": ROWS[:1], "more": ROWS[1:]}, ROWS),
        ({"question": ["Grüße?", "2+2\u2028?"], "answer": ["ja", "4"]}, ROWS),
        ({"messages": [{"role": "user", "content": "a"}]}, [{"messages": [{"role": "user", "content": "a"}]}]),
        ([], []),
    ],
)
def test_layouts_of_a_json_file(tmp_path, value, expected):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    assert [row for _, row in read(path)] == expected


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row for _, row in read(path)] == ROWS


@pytest.mark.parametrize("text", ['"just text"', '{"a": 1}', "3"])
def test_a_json_file_without_rows_is_named(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json: expected a list of objects"):
        read(tmp_path / "rows.json")


def test_broken_json_file_names_line_and_column(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(UserError, match=r"rows\.json: broken JSON at line 3, column 7"):
        read(tmp_path / "rows.json")


def test_broken_lines_stay_in_the_count_with_their_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = "[" * 100_000
    many_digits = '{"a": ' + "9" * 5000 + "}"
    lines = ['{"a": 1}', "", '{"a": ', "[1, 2]", '"text"', deep, many_digits, '{"a": "\\ud800"}', "{}"]
    path.write_text("\n".join(lines) + "\n")
    summary, records, entries = run_data(tmp_path, [source(path)])
    assert summary == {"rows": 8, "unreadable": 5, "sources": 1}
    by_row = {record["row"]: record for record in records}
    assert sorted(by_row) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert by_row[1]["data"] == {"a": 1} and by_row[9]["data"] == {}
    assert "broken JSON at line 3" in by_row[3]["error"]
    assert by_row[3]["raw"] == '{"a": '
    assert "not an object with named columns but a list" in by_row[4]["error"]
    assert "text" in by_row[5]["error"]
    assert "surrogate" in by_row[8]["error"]
    assert all("data" not in by_row[n] for n in (3, 4, 5, 6, 7, 8))
    assert entries[0]["unreadable"] == 5


def test_row_nested_too_deep_becomes_an_error_row_but_brackets_in_text_do_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 80 + "]" * 80 + '}\n{"a": "' + "[" * 200 + '"}\n')
    _, records, _ = run_data(tmp_path, [source(path)])
    assert "nested" in records[0]["error"]
    assert records[1]["data"] == {"a": "[" * 200}


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


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=r"rows\.parquet: can't be read as Parquet"):
        read(tmp_path / "rows.parquet")


def test_missing_files_and_empty_patterns_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*none\.jsonl"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"no file matches .*\*\.jsonl"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(UserError, match="is a directory"):
        read(tmp_path)


def test_pattern_gives_one_named_entry_a_file_in_sorted_order(tmp_path):
    for folder, name in (("b", "rows"), ("a", "rows"), ("a", "other")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.jsonl").write_text(f'{{"from": "{folder}/{name}"}}\n')
    summary, records, entries = run_data(tmp_path, [source(tmp_path / "*/*.jsonl", license="MIT")])
    assert [entry["name"] for entry in entries] == ["other", "a/rows", "b/rows"]
    assert [record["data"]["from"] for record in records] == ["a/other", "a/rows", "b/rows"]
    assert all(entry["license"] == "MIT" and len(entry["sha256"]) == 64 for entry in entries)
    assert {record["split"] for record in records} == {None}


def test_a_file_listed_twice_has_two_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    same = source(tmp_path / "rows.jsonl")
    _, records, entries = run_data(tmp_path, [same], heldout=[same])
    assert [entry["split"] for entry in entries] == ["train", "heldout"]
    assert len({(record["source"], record["row"]) for record in records}) == 2


def test_limit_takes_the_first_rows_of_the_whole_source(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"n": "{name}{i}"}}\n' for i in range(3)))
    assert [row["n"] for _, row in read(tmp_path / "*.jsonl", limit=5)] == ["a0", "a1", "a2", "b0", "b1"]


def test_sample_goes_by_content_not_by_place(tmp_path):
    lines = [f'{{"n": {i}}}\n' for i in range(200)]
    (tmp_path / "there.jsonl").write_text("".join(lines))
    (tmp_path / "back.jsonl").write_text("".join(reversed(lines)))
    there = [row["n"] for _, row in read(tmp_path / "there.jsonl", sample=20)]
    back = [row["n"] for _, row in read(tmp_path / "back.jsonl", sample=20)]
    assert len(there) == 20
    assert there == sorted(there) and back == there[::-1]
    assert max(there) - min(there) > 100
    assert len(read(tmp_path / "there.jsonl", sample=500)) == 200


CONVERTER = """
def rows(path, encoding):
    with open(path, encoding=encoding) as file:
        for line in file:
            yield {"prompt": line.strip(), "completion": "ok"} if line.strip() else None
"""


def test_converter_reads_any_format(tmp_path):
    (tmp_path / "mine.py").write_text(CONVERTER)
    (tmp_path / "rows.dat").write_bytes("caf\xe9\n\nb\n".encode("latin-1"))
    own = source(tmp_path / "rows.dat", convert=str(tmp_path / "mine.py"), encoding="latin-1")
    _, records, entries = run_data(tmp_path, [own])
    assert records[0]["data"] == {"prompt": "café", "completion": "ok"}
    assert "null" in records[1]["error"]
    assert entries[0]["kind"] == "converted" and len(entries[0]["convert"]["sha256"]) == 64
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", r"mine\.py: has no function rows\(path, encoding\)"),
        (
            "def rows(path, encoding):\n    yield {}\n    1 / 0\n",
            r"mine\.py, line 3: ZeroDivisionError while converting",
        ),
        ("import nowhere_to_be_found\n", r"mine\.py, line 1: ModuleNotFoundError"),
        ("def rows(:\n", r"mine\.py: SyntaxError"),
        ("def rows(path):\n    yield {}\n", r"mine\.py: TypeError"),
        (CONVERTER, r"rows\.dat: byte 3 \(0xe9\) is not valid utf-8"),
    ],
)
def test_converter_mistakes_are_named(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "rows.dat").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "rows.dat", convert=str(tmp_path / "mine.py"))
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path / "rows.dat", convert=str(tmp_path / "absent.py"))


def test_builtin_tickets_and_heldout_split(tmp_path):
    tickets = {"builtin": "tickets", "rows": 5, "seed": 1}
    _, records, entries = run_data(
        tmp_path, [{**tickets, "part": "train"}], heldout=[{**tickets, "part": "heldout", "rows": 3}]
    )
    assert [entry["name"] for entry in entries] == ["tickets-train", "tickets-heldout"]
    assert [record["split"] for record in records] == ["train"] * 5 + ["heldout"] * 3
    assert entries[1]["builtin"] == {"builtin": "tickets", "part": "heldout", "rows": 3, "seed": 1}
    with pytest.raises(UserError, match="no built-in source 'poems'"):
        list(rows.read_source({**tickets, "builtin": "poems", "part": "train"}, [("x", None)]))


def test_no_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.sources is empty"):
        run_data(tmp_path, [])


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), max_size=8))
def test_random_bytes_as_json_lines_are_all_accounted_for(tmp_path_factory, lines):
    tmp_path = tmp_path_factory.mktemp("random")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected = [line for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]
    _, records, entries = run_data(tmp_path, [source(path, encoding="latin-1")])
    assert len(records) == entries[0]["rows"] == len(expected)
    assert all(("data" in record) != ("error" in record) for record in records)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(st.characters(), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(JSON, max_size=6))
def test_random_json_values_come_back_as_they_were(tmp_path_factory, values):
    tmp_path = tmp_path_factory.mktemp("values")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    _, records, _ = run_data(tmp_path, [source(path)])
    assert len(records) == len(values)
    for value, record in zip(values, records, strict=True):
        if isinstance(value, dict) and "error" not in record:
            assert json.dumps(record["data"], sort_keys=True) == json.dumps(value, sort_keys=True)
        else:
            assert "error" in record
