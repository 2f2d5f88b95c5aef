"""What is declared of the files of the stage "data" is what stands in them."""

from adder.data import records
from data_stages import write_rows


def test_files_have_just_the_keys_that_are_declared(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{\n')
    (tmp_path / "mine.py").write_text("def rows(path, encoding):\n    yield {}\n")
    path = str(tmp_path / "rows.jsonl")
    listed = [{"path": path}, {"builtin": "tickets", "rows": 1}, {"path": path, "convert": str(tmp_path / "mine.py")}]
    written = write_rows(tmp_path / "data", listed)
    assert written.records[0].keys() == records.ReadableRecord.__required_keys__
    assert written.records[1].keys() == records.UnreadableRecord.__required_keys__
    optional = [entry.keys() - records.SourceRecord.__required_keys__ for entry in written.entries]
    assert optional == [set(), {"builtin"}, {"convert", "notes"}]
    assert all(entry.keys() >= records.SourceRecord.__required_keys__ for entry in written.entries)
    assert written.entries[1]["builtin"].keys() == records.BuiltinRecord.__required_keys__
    assert written.entries[2]["convert"].keys() == records.ConverterRecord.__required_keys__
    assert all(reading.keys() == records.Reading.__required_keys__ for reading in written.reading.values())
    assert written.summary.keys() == records.RowSummary.__required_keys__
