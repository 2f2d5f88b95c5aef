"""Random broken rows never crash the stage "format", and never vanish from its count."""

import json

import orjson
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs, Runtime
from adder.data import fetch_rows
from adder.data.stage import RowSettings, Source
from adder.formatting import block_converter
from adder.formatting.accepted_rows import CLASSES
from adder.formatting.messages import why_not_json
from adder.formatting.rejected import Rejected
from adder.formatting.row_formats import ROW_FORMATS, SourceFormat, to_conversation
from adder.formatting.run import FormatInputs, run
from format_stage import format_settings, write_reading

SETTINGS = format_settings(system_prompt="Be kind.", near_duplicates="drop", overlap="drop", share=0.5)
CONTEXT = Context(Progress.silent(), Runtime(threads=1))
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
PART = st.one_of(ODD, st.fixed_dictionaries({}, optional={"type": st.one_of(ODD, st.just("text")), "text": ODD}))
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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["train", "heldout", "test"]), st.sampled_from(["a", "b", "own", "own"]), ROW),
        max_size=10,
    ),
    reading=READINGS,
    own_sources=st.booleans(),
)
def test_random_broken_rows_never_crash_and_never_vanish(tmp_path_factory, rows, reading, own_sources):
    folder, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    good = [
        (
            split,
            "good",
            {"messages": [{"role": "user", "content": f"{split} {n}"}, {"role": "assistant", "content": "a"}]},
        )
        for split in ("train", "heldout")
        for n in range(20)
    ]
    records = [
        {
            "source": f"own {n}" if source == "own" else source,
            "row": n,
            "split": split if own_sources or split == "test" else None,
            "data": row,
        }
        for n, (split, source, row) in enumerate([*rows, *good], 1)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {record["source"]: {} for record in records}
    write_reading(folder, {**names, "a": {"weight": 0.5}, "b": reading})
    run(SETTINGS, FormatInputs(folder), out, CONTEXT)
    accounted_for(folder, out, read_json(out / "card.json"), len(records))


USER = st.fixed_dictionaries({"role": st.just("user"), "content": GOOD})


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=USER, between=st.lists(MESSAGE, max_size=3), last=REPLY, tools=st.none() | TOOLS)
def test_messages_are_read_whole_or_rejected(first, between, last, tools):
    """Whatever is accepted is what the next stages are promised."""
    # As the stage reads it: NaN is nothing, half surrogate pairs stay.
    row = block_converter.parse_line(json.dumps({"messages": [first, *between, last], "tools": tools}).encode())
    try:
        conversation = to_conversation(row, SourceFormat(ROW_FORMATS["messages"], {}, True))
        encoded = orjson.dumps(conversation)
    except Rejected as reason:
        assert reason.kind and str(reason)
        return
    except TypeError as error:
        assert why_not_json(conversation, error).kind
        return
    read = json.loads(encoded)
    assert read == conversation
    assert set(read) <= {"messages", "tools"} and read.get("tools") != []
    allowed = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train"}
    assert read["messages"][-1]["role"] == "assistant" and len(read["messages"]) == len(row["messages"])
    for message in read["messages"]:
        assert set(message) <= allowed and message["role"] in ("system", "user", "assistant", "tool")
        assert message["content"].strip() or (message["role"] == "assistant" and message["tool_calls"])
        assert message.get("train", False) is False
        assert all(isinstance(call["function"]["arguments"], dict) for call in message.get("tool_calls", []))
    assert any("train" not in message for message in read["messages"] if message["role"] == "assistant")


LINE = st.one_of(
    st.binary(max_size=40),
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")),
    st.sampled_from([b"", b"{", b"null", b'{"question": NaN, "answer": 1}', b'{"text": "\\ud800"}', b"[" * 2000, b"3"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(lines=st.lists(LINE, max_size=8))
def test_garbage_in_a_file_goes_through_both_stages(tmp_path_factory, lines):
    """From the raw bytes on: a line is a row or an unreadable one, or the file is refused as a whole."""
    tmp_path = tmp_path_factory.mktemp("garbage")
    folder, out = tmp_path / "data", tmp_path / "format"
    folder.mkdir()
    out.mkdir()
    good = [json.dumps({"question": f"q {n}", "answer": f"a {n}"}).encode() for n in range(20)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*good, *lines]))
    given = RowSettings(sources=[Source(path=str(tmp_path / "rows.jsonl"))])
    try:
        read = fetch_rows.run(given, NoInputs(), folder, Context(Progress.silent()))
    except UserError as error:
        assert "rows.jsonl" in str(error)
        return
    run(SETTINGS, FormatInputs(folder), out, CONTEXT)
    accounted_for(folder, out, read_json(out / "card.json"), read["rows"])
