"""Which rows are taken, and no row ever lost on the way into rows.jsonl."""

import json
import re
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import assume, given
from hypothesis import strategies as st

from adder.data import compression, raw_rows
from data_stages import JSON, read, write_rows
from examples import examples


def test_parquet_rows_with_dates_and_nulls_reach_rows_jsonl(tmp_path):
    table = pa.table({"a": ["x", None], "day": [date(2024, 5, 3), None], "sum": [Decimal("1.50"), None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / "rows.parquet")}])
    assert records[0]["data"] == {"a": "x", "day": "2024-05-03", "sum": "1.50"}
    assert records[1]["data"] == {"a": None, "day": None, "sum": None}
    assert entries[0]["kind"] == "parquet" and entries[0]["rows"] == 2


def test_broken_lines_stay_in_the_count_with_their_line_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = "[" * 100_000
    many_digits = '{"a": ' + "9" * 5000 + "}"
    lines = ['{"a": 1}', "", '{"a": ', "[1, 2]", '"text"', deep, many_digits, '{"a": "\\ud800"}', "{}"]
    path.write_text("\n".join(lines) + "\n")
    summary, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert summary == {"rows": 8, "unreadable": 6, "sources": 1}
    by_row = {record["row"]: record for record in records}
    assert sorted(by_row) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert by_row[1]["data"] == {"a": 1} and by_row[9]["data"] == {}
    assert "broken JSON at line 3" in by_row[3]["error"]
    assert by_row[3]["raw"] == '{"a": '
    assert "not an object with named columns but a list" in by_row[4]["error"]
    assert "text" in by_row[5]["error"]
    assert "surrogate" in by_row[8]["error"]
    assert all("data" not in by_row[n] for n in (3, 4, 5, 6, 7, 8))
    assert entries[0]["unreadable"] == 6


def test_numbers_beyond_json_or_64_bits_do_not_lose_the_row_or_their_digits(tmp_path):
    path = tmp_path / "rows.jsonl"
    big = 123456789012345678901234567890
    path.write_text(
        f'{{"n": {big}, "x": NaN}}\n{{"n": -{2**63 + 1}, "x": [Infinity]}}\n{{"x": 1e400}}\n{{"n": {2**64 - 1}}}\n'
    )
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert [record["data"] for record in records] == [
        {"n": big, "x": None},
        {"n": -(2**63) - 1, "x": None},
        {"x": None},
        {"n": 2**64 - 1},
    ]
    assert [record.get("unfit") for record in records] == [None, {"x": raw_rows.NO_NUMBER}, None, None]
    lines = (tmp_path / "data" / "rows.jsonl").read_text().replace(raw_rows.NO_NUMBER, "")
    assert "NaN" not in lines and "Infinity" not in lines


def test_row_nested_too_deep_becomes_an_error_row_but_brackets_in_text_do_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 80 + "]" * 80 + '}\n{"a": "' + "[" * 200 + '"}\n')
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert "nested" in records[0]["error"]
    assert records[1]["data"] == {"a": "[" * 200}


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


def test_a_sample_is_the_same_each_time_where_columns_cant_be_read(tmp_path):
    table = pa.table({"raw": [b"x"] * 100, "n": list(range(100))})
    pq.write_table(table, tmp_path / "rows.parquet")
    one, other = ([row["n"] for _, row in read(tmp_path / "rows.parquet", sample=5)] for _ in range(2))
    assert one == other and len(one) == 5


@examples(150)
@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), max_size=8))
def test_random_bytes_as_json_lines_are_all_accounted_for(tmp_path_factory, lines):
    tmp_path = tmp_path_factory.mktemp("random")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    assume(not path.read_bytes().startswith(tuple(compression.COMPRESSIONS)))
    expected = [line for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]
    _, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path), "encoding": "latin-1"}])
    assert len(records) == entries[0]["rows"] == len(expected)
    assert all(("data" in record) != ("error" in record) for record in records)


def is_inner_nan(value):
    return isinstance(value, dict | list) and bool(re.search(r"NaN|Infinity", json.dumps(value)))


@examples(100)
@given(values=st.lists(JSON, max_size=6))
def test_random_json_values_come_back_as_they_were(tmp_path_factory, values):
    tmp_path = tmp_path_factory.mktemp("values")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert len(records) == len(values)
    for value, record in zip(values, records, strict=True):
        if isinstance(value, dict) and "error" not in record:
            # JSON has no NaN and no infinities: a column that is one is nothing, and so is one that holds one.
            kept = {key: None if is_inner_nan(inner) else inner for key, inner in value.items()}
            expected = json.loads(json.dumps(kept), parse_constant=lambda _: None)
            assert json.dumps(record["data"], sort_keys=True) == json.dumps(expected, sort_keys=True)
        else:
            assert "error" in record
