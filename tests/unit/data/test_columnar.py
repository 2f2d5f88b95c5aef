"""Rows of Parquet, Arrow and saved data sets are what their author wrote, not what the schema made of it."""

import json
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from pyarrow import orc

from adder.core.errors import UserError
from adder.data.columnar import NULLS_LEFT_OUT
from data_stages import SUMS, data, read, write_rows

TOOLS = [
    {"type": "function", "function": {"name": "pay", "parameters": {"type": "object", "properties": {"to": {"a": 1}}}}},
    {"type": "function", "function": {"name": "rain", "parameters": {"properties": {"city": {"enum": ["Ulm"]}}}}},
]


def _called(name, arguments):
    return {
        "messages": [
            {"role": "user", "content": "Do it."},
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        ],
        "tools": TOOLS,
    }


CALLS = [_called("pay", {"amount": 0, "to": "EUR"}), _called("rain", {"city": "Ulm", "days": [1, 2]})]


def _saved(rows, folder, way):
    """The path of the rows as saved in one way."""
    import datasets

    folder.mkdir()
    if way == "pyarrow":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return folder / "rows.parquet"
    if way == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(folder / "rows.arrow", table.schema) as writer:
            writer.write_table(table)
        return folder / "rows.arrow"
    if "json" in way:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        held = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))
        dataset = held["train"]
    else:
        dataset = datasets.Dataset.from_list(rows)
    if way.endswith("parquet"):
        dataset.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


WAYS = ("pyarrow", "arrow", "list, disk", "list, parquet", "json, disk", "json, parquet")


@pytest.mark.parametrize("way", WAYS)
def test_keys_that_a_schema_filled_in_are_gone_from_calls_tools_and_messages(tmp_path, way):
    path = _saved(CALLS, tmp_path / "made", way)
    _, records, entries, _, shown = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert data(records) == CALLS
    if "json" not in way:  # there the values that differ are stored as JSON, so that nothing is filled in
        assert any(note.startswith(NULLS_LEFT_OUT) for note in entries[0]["notes"])
        assert NULLS_LEFT_OUT in shown


def test_orc_files_are_read_but_for_structs_in_structs_which_pyarrow_does_not_bring_back(tmp_path):
    talk = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}", **more}]}
        for n, more in enumerate([{}, {"tags": ["x"]}] * 1000)
    ]
    rows = [
        {**row, "number": n, "nested": {"a": {"b": n}} if n % 2 else {"c": {"e": ["x"]}}} for n, row in enumerate(talk)
    ]
    path = tmp_path / "rows.orc"
    orc.write_table(pa.Table.from_pylist(rows), path, stripe_size=1 << 16)
    _, records, entries, _, shown = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert data(records) == [{**row, "number": n, "nested": None} for n, row in enumerate(talk)]
    assert all("which pyarrow mixes up in ORC" in record["unfit"]["nested"] for record in records)
    assert "the column 'nested' is of the type" in shown and entries[0]["kind"] == "orc"
    with pytest.raises(UserError, match="rows.orc: can't be read"):
        path.write_bytes(b"ORC" + bytes(100))
        write_rows(tmp_path / "broken", [{"path": str(path)}])


@pytest.mark.parametrize("way", ["json, disk", "json, parquet"])
def test_values_stored_as_json_are_read_with_the_nulls_that_their_author_wrote(tmp_path, way):
    rows = [
        {"messages": [{"role": "user", "content": "a", "x": None}, {"role": "assistant", "content": "b", "n": 1.5}]},
        {"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "call": {"a": [None, {"b": None}]}}]},
    ]
    assert [row for _, row in read(_saved(rows, tmp_path / "made", way))] == rows


def test_a_null_that_is_written_in_json_lines_stays(tmp_path):
    rows = [_called("pay", {"to": None, "list": [{"a": None}]})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read(tmp_path / "rows.jsonl")] == rows


def test_nulls_among_columns_and_in_lists_stay(tmp_path):
    rows = [{"a": None, "b": [None, "x"], "c": [None, {"d": [None]}]}, {"a": "x", "b": None, "c": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == rows


def test_json_text_is_known_by_the_fields_metadata_and_by_the_features_of_datasets(tmp_path):
    text = ['{"a": null, "b": [1]}', None, "no JSON"]
    read_back = [{"a": None, "b": [1]}, None, "no JSON"]
    features = {"f": {"_type": "Json"}, "l": {"_type": "List", "feature": {"x": {"_type": "Json"}}}}
    schema = pa.schema(
        [
            pa.field("m", pa.string(), metadata={"ARROW:extension:name": "arrow.json"}),
            pa.field("f", pa.large_string()),
            pa.field("l", pa.list_(pa.struct({"x": pa.string()}))),
            pa.field("text", pa.string()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    nested = [[{"x": text[0]}], None, [{"x": None}]]
    table = pa.table([text, text, nested, text], schema=schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    found = [row for _, row in read(tmp_path / "rows.parquet")]
    assert [row["m"] for row in found] == [row["f"] for row in found] == read_back
    assert [row["l"] for row in found] == [[{"x": read_back[0]}], None, [{}]]
    assert [row["text"] for row in found] == text


def test_a_map_is_an_object_that_keeps_its_nulls(tmp_path):
    type = pa.map_(pa.string(), pa.struct({"a": pa.int64(), "b": pa.string()}))
    table = pa.table({"m": pa.array([[("x", {"a": 1, "b": None}), ("y", None)], None], type)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == [{"m": {"x": {"a": 1}, "y": None}}, {"m": None}]


def test_a_column_that_json_cant_hold_is_named_and_costs_no_row(tmp_path):
    table = pa.table(
        {
            "question": ["a", "b"],
            "took": pa.array([timedelta(seconds=3), None], pa.duration("ns")),
            "image": [{"bytes": b"\xff", "path": "a.png"}, {"bytes": None, "path": "b.png"}],
            "raw": [b"\x00", b"text"],
            "day": [date(2024, 5, 3)] * 2,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    summary, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / "rows.parquet")}])
    assert summary["unreadable"] == 0
    empty = {"took": None, "raw": None, "day": "2024-05-03"}
    assert data(records) == [
        {"question": "a", "image": None, **empty},
        {"question": "b", "image": {"path": "b.png"}, **empty},
    ]
    assert [record["unfit"] for record in records] == [
        {"took": "duration[ns]", "image": "binary", "raw": "binary"},
        {"raw": "binary"},
    ]
    assert "the column 'raw' is of the type binary, which can't be read" in entries[0]["notes"]


def test_one_value_that_isnt_valid_costs_no_other(tmp_path):
    text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    with pa.ipc.new_file(tmp_path / "rows.arrow", pa.schema({"a": pa.string(), "b": pa.int64()})) as writer:
        writer.write_table(pa.table({"a": text, "b": [1, 2]}))
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / "rows.arrow")}])
    assert data(records) == [{"a": "a", "b": 1}, {"a": None, "b": 2}]
    assert "unfit" not in records[0] and "isn't valid" in records[1]["unfit"]["a"]


def test_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="more than one column named 'a'"):
        read(tmp_path / "rows.parquet")


def test_arrow_files_in_either_format_and_batches_of_any_size(tmp_path):
    table = pa.table({"n": list(range(5000)), "day": [date(2024, 5, 3)] * 5000})
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=999)
    pyarrow.feather.write_feather(table, str(tmp_path / "file.feather"))
    for name in ("file.arrow", "stream.arrow", "file.feather"):
        found = read(tmp_path / name)
        assert [(number, row["n"]) for number, row in found] == [(n + 1, n) for n in range(5000)]
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"bad\.arrow: can't be read as Arrow"):
        read(tmp_path / "bad.arrow")


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=r"rows\.parquet: can't be read as Parquet"):
        read(tmp_path / "rows.parquet")


def test_folders_that_datasets_saved(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(SUMS)
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict(train=whole, test=whole.select(range(5))).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(train=whole).save_to_disk(tmp_path / "one")
    for name in ("saved", "splits/test", "one"):
        _, records, entries, *_ = write_rows(tmp_path / "of" / name, [{"path": str(tmp_path / name)}])
        assert data(records) == (SUMS[:5] if name == "splits/test" else SUMS)
        assert entries[0]["kind"] == "arrow" and len(entries[0]["sha256"]) == 64
        assert [record["row"] for record in records] == list(range(1, len(records) + 1))
    with pytest.raises(UserError, match=r"holds several splits; name the folder of one: .*splits/train, .*splits/test"):
        write_rows(tmp_path / "both", [{"path": str(tmp_path / "splits")}])
    _, records, *_ = write_rows(tmp_path / "named", [{"path": str(tmp_path / "splits"), "split": "test"}])
    assert data(records) == SUMS[:5]
    with pytest.raises(UserError, match=r"has no split 'dev'; it has train, test"):
        write_rows(tmp_path / "dev", [{"path": str(tmp_path / "splits"), "split": "dev"}])
    with pytest.raises(UserError, match="is a directory, and none that `datasets` saved"):
        write_rows(tmp_path / "neither", [{"path": str(tmp_path)}])


def test_labels_that_datasets_numbers_are_read_by_their_names(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "more": datasets.List({"kind": datasets.ClassLabel(names=["x", "y"])}),
        }
    )
    rows = {"text": ["a", "b", "c"], "label": [0, 1, None], "more": [[{"kind": 1}], [], None]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        _, records, entries, *_ = write_rows(tmp_path / f"data-{name}", [{"path": str(tmp_path / name)}])
        assert [row["label"] for row in data(records)] == ["bad", "good", None]
        assert [row["more"] for row in data(records)] == [[{"kind": "y"}], [], None]
        assert entries[0]["notes"] == ["labels that `datasets` numbers are read by their names"]
