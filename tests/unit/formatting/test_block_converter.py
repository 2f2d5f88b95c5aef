"""A block of rows to conversations, hashes and counts."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from adder.formatting import block_converter
from adder.formatting.similarity.words import folded
from format_stage import (
    format_rows,
    reply,
    user,
)


def test_what_makes_conversations_different(tmp_path):
    """Tools, calls, reasoning and marks count; the identities of calls, drawn anew for each copy, do not."""

    def calling(identity, arguments, **more):
        call = {"id": identity, "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        turns.append({"role": "tool", "tool_call_id": identity, "content": "r"})
        return {"messages": [*turns, {**reply("a"), **more}]}

    rows = [
        *(calling("1", {"x": 1}), calling("2", {"x": 1}), calling("1", {"x": 2})),
        *(calling("1", {"x": 1}, reasoning="r"), calling("1", {"x": 1}, weight=0)),
        {**calling("1", {"x": 1}), "tools": [{"name": "f"}]},
    ]
    formatted = format_rows(
        tmp_path, [("train", row) for row in rows] + [("heldout", {"messages": [user("h"), reply("a")]})]
    )
    assert [row["row"] for row in formatted.duplicates] == [2]


@given(st.text(st.one_of(st.characters(max_codepoint=127), st.characters(), st.sampled_from(" \n\t")), max_size=30))
def test_normalise_folds_and_leaves_single_spaces(text):
    try:
        expected = " ".join(folded(text).split()).encode()
    except UnicodeEncodeError:
        return
    assert block_converter.normalise(text) == expected


def test_a_column_of_few_rows_is_found_among_any_number_of_column_sets():
    known = block_converter.Survey(
        Counter(), {"s": Counter({(f"c{n}",): 1 for n in range(block_converter.MOST_COLUMN_SETS)})}
    )
    known.add(block_converter.Survey(Counter(), {"s": Counter({("c1", "c2"): 5, ("c1", "rare"): 1})}))
    assert ("c1", "rare") in known.column_sets["s"] and ("c1", "c2") not in known.column_sets["s"]


def test_a_value_is_one_however_a_file_writes_it():
    assert len({block_converter.hash_value(value) for value in (7, 7.0, "7")}) == 1
    assert {block_converter.hash_value(value) for value in (None, "", float("nan"))} == {bytes(8)}
    assert block_converter.hash_value(True) != block_converter.hash_value(1)


def test_a_column_is_categorical_with_few_short_values_of_one_type():
    assert block_converter.count_values(["a", "b", "a", None, ""]) == {"a": 2, "b": 1}
    for values in (["a", 1], [1.5, 2.5], ["x" * 81], list(range(51)), [["a"]], [{"a": 1}]):
        assert block_converter.count_values(values) is None, values


def test_blocks_are_whole_lines_and_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(block_converter, "BLOCK", 10)
    lines = [b"x" * size + b"\n" for size in (3, 25, 9, 0, 10, 4)] + [b"no end"]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines))
    found = block_converter.blocks(tmp_path / "rows.jsonl")
    assert found[0][0] == 0 and found[-1][1] == len(b"".join(lines))
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
    ends = {sum(map(len, lines[: n + 1])) for n in range(len(lines))}
    assert {end for _, end in found} <= ends
