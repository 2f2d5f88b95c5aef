"""One JSON document, row by row: its layouts, read in pieces of any size, and where a mistake is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.data import json_stream
from data_stages import GREETINGS, JSON, read
from examples import examples


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"data": GREETINGS, "version": "1"}, GREETINGS),
        ({"labels": ["a"], "data": GREETINGS, "splits": []}, GREETINGS),
        ({"question": ["Grüße?", "2+2\u2028?"], "answer": ["ja", "4"]}, GREETINGS),
        ({"messages": [{"role": "user", "content": "a"}]}, [{"messages": [{"role": "user", "content": "a"}]}]),
        ([], []),
    ],
)
def test_layouts_of_a_json_file(tmp_path, value, expected):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    assert [row for _, row in read(path)] == expected


@pytest.mark.parametrize("chunk", [1, 3, 50])
@examples(60)
@given(data=st.data())
def test_a_json_file_read_in_pieces_is_the_same_as_read_whole(tmp_path_factory, chunk, data):
    rows_ = data.draw(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=5))
    columns = {"a": [1, -2.5e-7, None, "x]\\"], "b": [True, [], "\ud83d\ude00", [1]]}
    indent = data.draw(st.sampled_from([None, 1]))
    path = tmp_path_factory.mktemp("pieces") / "rows.json"
    whole = [dict(zip("ab", cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for layout, expected in (
        (rows_, rows_),
        ({"v": "1", "x": [1, 2], "rows": [*rows_, {}]}, [*rows_, {}]),
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
        ("[" * 100_000 + "]" * 100_000, r"line 1, column 2: nested too deep"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_mistake_in_a_json_file_is_named_by_line_and_column(tmp_path, monkeypatch, text, where, chunk):
    monkeypatch.setattr("adder.data.json_stream.CHUNK", chunk)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=rf"rows\.json: broken JSON at {where}"):
        read(tmp_path / "rows.json")


def test_one_of_several_lists_of_rows_must_be_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "train": GREETINGS, "test": GREETINGS[:1], "notes": ["a"]}))
    with pytest.raises(UserError, match=r"several lists of rows: train \(2\), test \(1\)\. .*`split: train`"):
        read(path)
    assert [row for _, row in read(path, split="test")] == GREETINGS[:1]
    with pytest.raises(UserError, match="no list under the key 'dev', which `split` names; its lists are train, test"):
        read(path, split="dev")
    path.write_text(json.dumps(GREETINGS))
    with pytest.raises(UserError, match="one list of rows, so `split: test` names nothing there"):
        read(path, split="test")


def test_a_part_of_a_file_without_parts_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match=r"`split: train` names a list .* read as csv, which has no parts"):
        read(tmp_path / "rows.csv", split="train")


@pytest.mark.parametrize("key", ["messages", "conversations", "contents", "chat_history"])
def test_a_file_of_one_conversation_is_one_row(tmp_path, key):
    row = {"tools": [{"name": "f"}], key: [{"role": "user"}, {"role": "model"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert read(tmp_path / "a.json") == [(1, row)]
