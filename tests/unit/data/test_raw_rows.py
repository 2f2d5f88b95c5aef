"""Raw rows: every format, every encoding, and no row ever lost."""

import json
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.core.progress import Progress
from adder.data import fetch_rows, json_stream, raw_rows, readers, sources


def source(path, **changes):
    defaults = {"format": "auto", "encoding": "utf-8", "convert": None, "limit": None, "sample": None, "license": None}
    return {"path": str(path), **defaults, **changes}


def read(path, **changes):
    """(row number, row) of one source."""
    own = source(path, **changes)
    named = [(str(n), file) for n, file in enumerate(sources.fetch(own, "data.sources.0", Progress.silent()))]
    return [(number, row) for _, number, row in raw_rows.read_source(own, named)]


def run_data(tmp_path, sources, heldout=None):
    out = tmp_path / "data"
    out.mkdir()
    summary = fetch_rows.run({"sources": sources, "heldout": {"sources": heldout}}, {}, out, Progress.silent())
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


@pytest.mark.parametrize("chunk", [1, 3, 50])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_json_file_read_in_pieces_is_the_same_as_read_whole(tmp_path_factory, chunk, data):
    rows_ = data.draw(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=5))
    columns = {"a": [1, -2.5e-7, None, "x]\\"], "b": [True, [], "\ud83d\ude00", [1]]}
    indent = data.draw(st.sampled_from([None, 1]))
    path = tmp_path_factory.mktemp("pieces") / "rows.json"
    whole = [dict(zip("ab", cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for layout, expected in (
        (rows_, rows_),
        ({"v": "1", "rows": [*rows_, {}], "x": [1, {}]}, [*rows_, {}, 1, {}]),
        (columns, whole),
    ):
        path.write_text(
            json.dumps(layout, indent=indent, ensure_ascii=data.draw(st.booleans())), "utf-8", "surrogatepass"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("adder.data.json_stream.CHUNK", chunk)
            found = list(json_stream.rows(lambda: path.open(encoding="utf-8", errors="surrogatepass")))
        assert json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"a": 1},\n {"a": 1 "b": 2}]', r"line 2, column 10: Expecting ',' delimiter"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2, column 2: Expecting ',' or ']'"),
        ('[{"a": 1}', r"line 1, column 10: Expecting ',' or ']'"),
        ('[{"a": "never closed', r"line 1, column 8: Unterminated string"),
        ('{"rows": [{"a": 1}], 3: 4}', r"line 1, column 22: Expecting property name"),
        ('[{"a": 1}] []', r"line 1, column 12: Extra data"),
        ("", r"line 1, column 1: Expecting value"),
        ("[" * 3000 + "]" * 3000, r"line 1, column 2: nested too deep"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_mistake_in_a_json_file_is_named_by_line_and_column(tmp_path, monkeypatch, text, where, chunk):
    monkeypatch.setattr("adder.data.json_stream.CHUNK", chunk)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=rf"rows\.json: broken JSON at {where}"):
        read(tmp_path / "rows.json")


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
    _, records, _ = run_data(tmp_path, [source(path)])
    assert [record["data"] for record in records] == [
        {"n": big, "x": None},
        {"n": -(2**63) - 1, "x": [None]},
        {"x": None},
        {"n": 2**64 - 1},
    ]
    lines = (tmp_path / "data" / "rows.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines


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


def test_each_file_of_a_pattern_has_the_first_encoding_that_fits_all_of_it(tmp_path):
    start = b'{"a": "' + b"x" * 3_000_000
    for name, end in (("one", "é".encode()), ("two", b"\xe9"), ("three", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(start + end + b'"}\n')
    own = source(tmp_path / "*.jsonl", encoding=["utf-8", "cp1252"])
    _, records, entries = run_data(tmp_path, [own])
    ends = {record["source"]: record["data"]["a"][-1] for record in records}
    assert ends == {"one": "é", "two": "é", "three": "x"}
    assert {entry["name"]: entry["encoding"] for entry in entries} == {
        "one": "utf-8",
        "two": "cp1252",
        "three": "utf-8",
    }
    with pytest.raises(
        UserError, match=r"two.jsonl: byte 3000007 .* is not valid utf-8, byte 3000007 .* not valid ascii"
    ):
        read(tmp_path / "two.jsonl", encoding=["utf-8", "ascii"])


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
    _, records, entries = run_data(tmp_path, [source(path)])
    assert [record["data"] for record in records] == table.to_pylist()
    assert (entries[0]["name"], entries[0]["kind"]) == ("rows", ending)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"rows.*: can't be read"):
        read(path)


def test_arrow_files_in_either_format_and_batches_of_any_size(tmp_path):
    table = pa.table({"n": list(range(5000)), "day": [date(2024, 5, 3)] * 5000})
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=999)
    for name in ("file", "stream"):
        found = read(tmp_path / f"{name}.arrow")
        assert [(number, row["n"]) for number, row in found] == [(n + 1, n) for n in range(5000)]
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"bad\.arrow: can't be read as Arrow"):
        read(tmp_path / "bad.arrow")


def test_old_line_ends_end_a_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a":1}\r{"a":2}\r\n\r\n{"a":\n3}')
    found = read(tmp_path / "rows.jsonl")
    assert [number for number, _ in found] == [1, 2, 4, 5]
    assert [row for _, row in found[:2]] == [{"a": 1}, {"a": 2}]


def test_a_quote_that_is_never_closed_does_not_swallow_a_file_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("adder.data.readers.MAX_CELL", 100)
    (tmp_path / "rows.csv").write_text('a,b\n"open,1\n' + "x,y\n" * 200)
    found = read(tmp_path / "rows.csv")
    assert "field larger than field limit" in found[0][1].reason
    assert found[-1][1] == {"a": "x", "b": "y"} and len(found) > 150


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=r"rows\.parquet: can't be read as Parquet"):
        read(tmp_path / "rows.parquet")


def test_missing_files_and_empty_patterns_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.sources.0.path: no file matches .*none\.jsonl"):
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
        list(raw_rows.read_source({**tickets, "builtin": "poems"}, [("x", sources.File(None, ("x",)))]))


def test_no_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.sources is empty"):
        run_data(tmp_path, [])


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), max_size=8))
def test_random_bytes_as_json_lines_are_all_accounted_for(tmp_path_factory, lines):
    tmp_path = tmp_path_factory.mktemp("random")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    assume(not path.read_bytes().startswith(tuple(readers.COMPRESSIONS)))
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
            # JSON has no NaN and no infinities.
            expected = json.loads(json.dumps(value), parse_constant=lambda _: None)
            assert json.dumps(record["data"], sort_keys=True) == json.dumps(expected, sort_keys=True)
        else:
            assert "error" in record
