"""Rows as they shouldn't be, made at random, and what must become of each of them."""

import json

import pyarrow.parquet as pq
from hypothesis import strategies as st

from adder.core.files import read_jsonl
from adder.formatting.accepted_rows import CLASSES

DEEP = [[]]
for _ in range(300):
    DEEP = [DEEP]

TEXT = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        ["a", "What is it?", "", " ", "\ud800", "b\udfff", "\x00", "{", "[]", '{"name": "f"}', "İ", "\u2028"]
    ),
)
ODD = st.one_of(
    *(TEXT, st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats()),
    *(st.just([]), st.just({}), st.just(DEEP), st.just(10**400)),
)
ROLE = st.sampled_from(
    [
        "system",
        "user",
        "assistant",
        "human",
        "gpt",
        "tool",
        "function_call",
        "observation",
        "developer",
        "",
        None,
        3,
        [],
    ]
)
JSON = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
FUNCTION = st.fixed_dictionaries({}, optional={"name": TEXT, "arguments": JSON, "parameters": JSON})
CALL = st.one_of(FUNCTION, JSON, st.fixed_dictionaries({"function": FUNCTION}, optional={"id": ODD, "type": ODD}))
PART_TYPE = st.sampled_from(["text", "thinking", "tool_use", "tool_result", "tool-call", "image", "output_text"])
PART_KEYS = ["thinking", "name", "input", "content", "tool_use_id", "thought", "train", "functionCall", "toolUse"]
PART_KEYS += ["functionResponse", "toolResult", "reasoningContent", "inlineData"]
PART = st.one_of(
    ODD,
    st.fixed_dictionaries({}, optional={"type": ODD | PART_TYPE, "text": ODD}),
    st.fixed_dictionaries({"type": PART_TYPE}, optional={"text": TEXT, **dict.fromkeys(PART_KEYS[:6], JSON)}),
    st.fixed_dictionaries({}, optional=dict.fromkeys(PART_KEYS, st.none() | JSON)),
    st.builds(lambda kind, name: {kind: {"name": name, "input": {}}}, st.sampled_from(PART_KEYS[-6:]), TEXT),
)
GOOD = st.sampled_from(["a", "What is it?", "Ça va?"])  # most must be right, or no row gets past its first mistake
CONTENT = st.one_of(GOOD, GOOD, GOOD, ODD, st.lists(PART, max_size=3))
GOOD_ROLE = st.sampled_from(["user", "assistant"])
GOOD_CALL = st.just({"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}})
MARK = st.sampled_from([0, 1, True, False, None, 0.5]) | ODD
MARKS = {"weight": MARK, "train": MARK, "masked": MARK, "reasoning": CONTENT, "name": CONTENT, "tool_call_id": CONTENT}
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": GOOD_ROLE, "content": GOOD}),
    st.fixed_dictionaries({"role": GOOD_ROLE | ROLE, "content": CONTENT}),
    st.fixed_dictionaries({"from": ROLE, "value": CONTENT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": CONTENT}, optional=MARKS),
    st.fixed_dictionaries(
        {"role": GOOD_ROLE | ROLE},
        optional={**MARKS, "content": CONTENT, "tool_calls": st.lists(CALL, max_size=2) | ODD},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": st.lists(GOOD_CALL | CALL, min_size=1, max_size=2)}
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": CONTENT}, optional={"tool_call_id": GOOD | ODD}),
    st.fixed_dictionaries({}, optional={"role": ROLE, "from": ROLE, "function_call": CALL, "value": CONTENT}),
    st.fixed_dictionaries({"role": GOOD_ROLE | ROLE, "parts": st.lists(PART, max_size=3)}, optional={"content": ODD}),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                ["message", "reasoning", "function_call", "function_call_output", "ai", "human", "x_call"]
            )
        },
        optional={
            **dict.fromkeys(("content", "summary", "data", "output", "arguments", "additional_kwargs"), CONTENT | JSON),
            "call_id": ODD,
            "name": TEXT,
            "role": ROLE,
            "tool_calls": st.lists(CALL, max_size=2),
        },
    ),
    ODD,
)
REPLY = st.fixed_dictionaries({"role": st.just("assistant"), "content": CONTENT}, optional=MARKS)
MESSAGES = st.one_of(
    st.lists(MESSAGE, max_size=4), st.builds(lambda *parts: [*parts[0], parts[1]], st.lists(MESSAGE), REPLY), ODD
)
TOOLS = st.one_of(st.lists(CALL, max_size=2), JSON)
ROW = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"tools": TOOLS, "system": ODD, "images": ODD}),
    st.fixed_dictionaries({"conversations": MESSAGES}, optional={"tools": TOOLS, "functions": TOOLS}),
    st.fixed_dictionaries(
        {"instruction": CONTENT, "output": CONTENT},
        optional={"input": CONTENT, "history": st.lists(st.lists(ODD, max_size=3), max_size=2) | ODD, "system": ODD},
    ),
    st.fixed_dictionaries({"prompt": MESSAGES | CONTENT, "completion": MESSAGES | CONTENT}),
    st.fixed_dictionaries({"question": CONTENT, "answer": CONTENT}, optional={"reasoning_content": ODD}),
    st.fixed_dictionaries({"chosen": MESSAGES | CONTENT}, optional={"rejected": ODD, "prompt": MESSAGES | CONTENT}),
    st.fixed_dictionaries({"text": CONTENT}, optional={"label": ODD}),
    st.fixed_dictionaries({"contents": MESSAGES}, optional={"systemInstruction": MESSAGE, "tools": TOOLS}),
    st.fixed_dictionaries({"input": MESSAGES, "output": MESSAGES}, optional={"instructions": ODD, "tools": TOOLS}),
    st.fixed_dictionaries({"chat_history": MESSAGES}, optional={"message": CONTENT, "response": CONTENT}),
    st.fixed_dictionaries({"messages": MESSAGES, "toolConfig": TOOLS | JSON}),
    st.dictionaries(TEXT, JSON, max_size=4),
)
READINGS = st.fixed_dictionaries(
    {"row_format": st.sampled_from(["auto", "preference", "text", "messages", "question_answer"])},
    optional={"weight": st.sampled_from([0.5, 1.0, 2.5])},
)


def accounted_for(folder, out, card, expected: int):
    """Every row stands in exactly one place: a class of the card, and there in the file of that class."""
    assert card["rows_in"] == expected
    for counts in [card, *card["by_source"].values()]:
        assert counts["rows_in"] == sum(counts[name] for name in (*CLASSES, "rejected"))
    ids = [f"{row['source']}:{row['row']}" for row in read_jsonl(folder / "rows.jsonl") if row["split"] != "test"]
    found = [i for name in ("train", "heldout") for i in pq.read_table(out / f"{name}.parquet")["id"].to_pylist()]
    found = [identity for identity in found if "#" not in identity]
    for name in ("rejects", "duplicates", "near_duplicates", "leaked"):
        dropped = [row for row in read_jsonl(out / f"{name}.jsonl") if row.get("dropped", True)]
        found += [f"{row['source']}:{row['row']}" for row in dropped]
    assert len(set(found)) == len(found)
    protected = {f"{r['source']}:{r['row']}" for r in read_jsonl(folder / "rows.jsonl") if r["split"] == "test"}
    assert len(set(ids) - set(found)) == card["left_out"] + card["undesired"]
    assert set(found) - protected <= set(ids)


LINE = st.one_of(
    st.binary(max_size=40),
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")),
    st.sampled_from([b"", b"{", b"null", b'{"question": NaN, "answer": 1}', b'{"text": "\\ud800"}', b"[" * 2000, b"3"]),
)
