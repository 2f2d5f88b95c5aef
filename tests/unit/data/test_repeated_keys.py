"""A key that stands twice in one object is refused where the two values differ, wherever JSON is read."""

import json

import pytest

from adder.core.errors import UserError
from adder.data.repeated_keys import RepeatedKeyError, check_keys, refuse_repeated
from data_stages import read, write_rows

GOOD = '{"question": "q", "answer": "a"}'
BAD = [
    '{"question": "q", "question": "p", "answer": "a"}',
    '{"question" : "q", "answer": {"x": [{"y": 1, "y" :2}]}}',
    '{"question": "q", "answer": "a", "\\u0061nswer": "b"}',
]


@pytest.mark.parametrize("line", BAD)
def test_a_row_with_two_values_under_one_key_is_unreadable(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{line}\n")
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(tmp_path / "a.jsonl")}])
    assert "error" not in records[0] and records[1]["kind"] == "repeated key"
    assert "stands more than once in one object" in records[1]["error"]
    (tmp_path / "a.json").write_text(f"[{GOOD}, {line}]")
    with pytest.raises(UserError, match=r"a\.json.*stands more than once in one object"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "line", [GOOD, '{"a": 1, "a": 1}', json.dumps({"text": '{"a": 1, "a": 2}', "b": {"c": [[{"d": '":'}]]}}), "{}"]
)
def test_text_that_looks_like_keys_and_equal_values_are_no_repetition(line):
    check_keys(line.encode(), json.loads(line))


def test_the_object_is_what_json_would_have_made():
    assert refuse_repeated([("a", 1), ("b", 2), ("a", 1)]) == {"a": 1, "b": 2}
    with pytest.raises(RepeatedKeyError, match="'a'"):
        refuse_repeated([("a", 1), ("a", 2)])
