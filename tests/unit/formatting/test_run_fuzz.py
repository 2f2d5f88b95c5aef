"""Random broken rows never crash the stage "format", and never vanish from its count."""

import json

import orjson
from hypothesis import given
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs, Runtime
from adder.data import fetch_rows
from adder.data.stage import RowSettings, Source
from adder.formatting import block_converter
from adder.formatting.messages import why_not_json
from adder.formatting.rejected import Rejected
from adder.formatting.row_formats import ROW_FORMATS, SourceFormat, to_conversation
from adder.formatting.run import FormatInputs, run
from broken_rows import GOOD, LINE, MESSAGE, READINGS, REPLY, ROW, TOOLS, accounted_for
from examples import examples
from format_stage import format_settings, write_reading

SETTINGS = format_settings(system_prompt="Be kind.", near_duplicates="drop", overlap="drop", share=0.5)
CONTEXT = Context(Progress.silent(), Runtime(threads=1))


@examples(150)
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


@examples(1500)
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


@examples(60)
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
