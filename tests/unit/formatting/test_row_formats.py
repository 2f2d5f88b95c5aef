"""Rows to conversations: every row format as people write it, and a reason for each row that can't be used."""

import json
from collections import Counter

import pytest
import yaml

from adder.core.errors import UserError
from adder.formatting.rejected import Rejected
from adder.formatting.row_formats import (
    ROW_FORMATS,
    SourceFormat,
    recognise,
    row_format_names,
    source_format,
    to_conversation,
    to_prompt,
)
from adder.formatting.row_notes import notes_of
from format_stage import (
    call,
    format_of,
    read,
    reply,
    result,
    system,
    user,
)


def messages_of(row, *args, **kwargs):
    return read(row, *args, **kwargs)["messages"]


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": [system("s"), user("q"), reply("a")]}, [system("s"), user("q"), reply("a")]),
        ("messages", {"messages": [user("q"), reply("a")], "system": "s"}, [system("s"), user("q"), reply("a")]),
        ("messages", {"messages": [system(""), user("q"), reply("a")]}, [user("q"), reply("a")]),
        ("messages", {"messages": json.dumps([user("q"), reply("a")])}, [user("q"), reply("a")]),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, {"role": " User", "content": "q"}, reply("a")]},
            [system("s"), user("q"), reply("a")],
        ),
        ("messages", {"messages": [reply("hi"), user("q"), user("r"), reply("a"), reply("b")]}, None),
        (
            "messages",
            {"messages": [user("q"), {**reply("a"), "tool_calls": None, "weight": 1, "train": True, "name": None}]},
            [user("q"), reply("a")],
        ),
        (
            "messages",
            {"messages": [user([{"type": "text", "text": "Look "}, {"type": "text", "text": "here"}]), reply("a")]},
            [user("Look here"), reply("a")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [system("s"), user("q"), reply("a")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, reply("a")]},
            [user("q"), reply("a")],
        ),
        ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, [user("Add.\n\n1 1"), reply("2")]),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "2"}, [user("Add."), reply("2")]),
        ("alpaca", {"instruction": "", "input": "Add.", "output": "2"}, [user("Add."), reply("2")]),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            [system("s"), user("a"), reply("b"), user("c"), reply("d")],
        ),
        ("prompt_completion", {"prompt": "q", "completion": " a\n"}, [user("q"), reply(" a\n")]),
        ("prompt_completion", {"prompt": [user("q")], "completion": [reply("a")]}, [user("q"), reply("a")]),
        ("prompt_completion", {"prompt": [system("s"), user("q")], "completion": "a"}, None),
        ("question_answer", {"question": "q", "answer": "a", "id": 7}, [user("q"), reply("a")]),
        (
            "question_answer",
            {"question": "q", "answer": "a", "reasoning_content": "r"},
            [user("q"), reply("a", reasoning_content="r")],
        ),
    ],
)
def test_row_formats(name, row, messages):
    assert recognise(row) is ROW_FORMATS[name]
    expected = messages or row.get("messages") or [*row["prompt"], reply(row["completion"])]
    assert read(row) == {"messages": expected}


def test_plain_text_is_recognised_unless_a_label_stands_beside_it():
    assert read({"text": " once\n", "source": "web"}) == {"text": " once\n"}
    with pytest.raises(Rejected, match="unknown row format.*row_format: text"):
        read({"text": "good film", "label": 1})
    assert read({"text": "good film", "label": 1}, "text") == {"text": "good film"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": [reply("a")], "rejected": [reply("b")]},
        {"chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("b")]},
        {"prompt": "q", "chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("b")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
)
def test_preference_data_trains_on_chosen_when_asked(row):
    assert recognise(row) is ROW_FORMATS["preference"]
    assert messages_of(row, "preference") == [user("q"), reply("a")]
    with pytest.raises(Rejected, match="row_format: preference"):
        read(row)


TALK = [{"from": "human", "value": "q"}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TALK, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"conversations": TALK, "chosen": [{"from": "gpt", "value": "a"}], "rejected": []},
        {"conversations": TALK, "chosen": "a", "rejected": "b"},
        {"messages": [user("q")], "chosen": reply("a"), "rejected": reply("b")},
        {"messages": [user("q")], "chosen": [reply("a")], "rejected": [reply("b")]},
        {"messages": [user("q"), reply("a")], "chosen": [reply("a")], "rejected": [reply("b")]},
        {"messages": [user("q"), reply("a")], "chosen": [user("q"), reply("a")], "rejected": []},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": reply("a"), "rejected": reply("b")},
        {"instruction": "q", "chosen": "a", "rejected": "b", "input": ""},
    ],
)
def test_the_prompt_of_a_preference_stands_in_many_places(row):
    assert recognise(row) is ROW_FORMATS["preference"]
    assert messages_of(row, "preference") == [user("q"), reply("a")]


def test_a_preference_keeps_all_that_is_asked():
    row = {"instruction": "i", "input": "n", "chosen": "a", "rejected": "b", "history": [["c", "d"]], "system": "s"}
    expected = [system("s"), user("c"), reply("d"), user("i\n\nn"), reply("a")]
    assert messages_of(row, "preference") == expected


@pytest.mark.parametrize("chosen", ["a", [reply("a")], reply("a")])
def test_a_preference_without_a_prompt_is_refused(chosen):
    with pytest.raises(Rejected, match="chosen has no prompt"):
        read({"chosen": chosen, "rejected": "b"}, "preference")
    with pytest.raises(Rejected, match="which is not the chosen one"):
        read({"messages": [user("q"), reply("x")], "chosen": chosen, "rejected": "b"}, "preference")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversation": [{"human": "q", "assistant": "a"}]}, [user("q"), reply("a")]),
        ({"conversation": [{"assistant": "a", "human": "q"}]}, [user("q"), reply("a")]),
        ({"conversation": [user("q"), reply("a")]}, [user("q"), reply("a")]),
        ({"Messages": [user("q"), reply("a")]}, [user("q"), reply("a")]),
        ({"QUESTION": "q", "Answer": "a"}, [user("q"), reply("a")]),
        ({"question": "q", "answer": 4}, [user("q"), reply("4")]),
        ({"question": "q", "answer": True}, [user("q"), reply("true")]),
        ({"question": "q", "answer": {"type": "x", "é": 1}}, [user("q"), reply('{"type": "x", "é": 1}')]),
        ({"prompt": 7, "response": 4.5}, [user("7"), reply("4.5")]),
        ({"prompt": user("q"), "completion": reply("a")}, [user("q"), reply("a")]),
        ({"messages": [user("q"), reply({"a": 1})]}, [user("q"), reply('{"a": 1}')]),
    ],
)
def test_names_and_values_of_other_projects(row, messages):
    assert messages_of(row) == messages


def test_two_readings_are_refused_with_a_line_for_each_that_works():
    row = {"problem": "q", "solution": "s", "answer": "a"}
    with pytest.raises(UserError) as refused:
        read(row)
    lines = [line for line in str(refused.value).splitlines() if line.startswith("  columns: ")]
    read_as = [messages_of(row, columns=yaml.safe_load(line)["columns"])[-1] for line in lines]
    assert read_as == [reply("a"), reply("s")]
    both = {"messages": [user("q"), reply("a")], "conversations": [user("q"), reply("b")]}
    with pytest.raises(
        UserError, match=r"columns: \{messages: messages\}\n  columns: \{conversations: conversations\}"
    ):
        read(both)
    assert messages_of(both, columns={"conversations": "conversations"})[-1] == reply("b")


@pytest.mark.parametrize(
    "row", [{"text": "t", "summary": "s"}, {"text": "t", "role": "prompter"}, {"text": "t", "prompt": "p"}]
)
def test_a_text_beside_something_else_is_refused_unless_it_is_named(row):
    with pytest.raises(Rejected, match="unknown row format.*row_format: text"):
        read(row)
    assert read(row, "text") == {"text": "t"}


def test_a_row_of_a_text_source_that_is_no_lone_text_is_refused():
    source = source_format("rows", "auto", {}, Counter({("text",): 3, ("text", "summary"): 1}))
    with pytest.raises(Rejected, match="columns unlike the rest"):
        to_conversation({"text": "t", "summary": "s"}, source)


def test_columns_are_mapped_by_name():
    row = {"problem": "q", "solution": "a", "thought": "r", "answer": "not this"}
    columns = {"question": "problem", "answer": "solution", "reasoning_content": "thought"}
    assert messages_of(row, columns=columns) == [user("q"), reply("a", reasoning_content="r")]
    assert messages_of({"dialogue": [user("q"), reply("a")]}, columns={"messages": "dialogue"}) == [
        user("q"),
        reply("a"),
    ]
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert messages_of({"prompt": "a", "completion": "q"}, columns=swapped) == [user("q"), reply("a")]


def test_columns_that_are_nowhere_are_refused():
    with pytest.raises(UserError, match=r"rows: .*columns: \{question: problm\}.*no row has.*problem, solution"):
        read({"problem": "q", "solution": "a"}, columns={"question": "problm"})
    with pytest.raises(UserError, match=r"maps 'asked', but the row format question_answer has only answer, "):
        read({"question": "q", "answer": "a", "x": "y"}, columns={"asked": "x"})
    with pytest.raises(UserError, match=r"maps 'asked', but the row formats have only answer, "):
        read({"x": "y"}, columns={"asked": "x"})


def test_a_source_is_what_most_of_its_rows_are():
    votes = Counter({("answer", "question"): 3, ("completion", "prompt"): 2, ("x",): 90})
    assert source_format("rows", "auto", {}, votes).name == "question_answer"
    assert source_format("rows", "auto", {}, Counter({("x",): 1})).name is None
    assert source_format("rows", "text", {}, votes).name == "text"


def test_the_columns_a_format_reads_go_by_their_actual_names():
    own = SourceFormat(ROW_FORMATS["question_answer"], {"question": "problem"}, False).own_columns()
    assert {"problem", "answer"} <= own and "question" not in own


def test_system_prompt_is_added_only_where_there_is_none():
    assert messages_of({"question": "q", "answer": "a"}, system_prompt="s") == [system("s"), user("q"), reply("a")]
    own = {"messages": [system("own"), user("q"), reply("a")]}
    assert messages_of(own, system_prompt="s")[0] == system("own")
    assert read({"text": "t"}, system_prompt="s") == {"text": "t"}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["x", "y"], "answer": 1},
        {"question": "q"},
        {"instruction": "q", "target": "x"},
        {"prompt": [user("q")]},
        {"messages": [user("q")]},
    ],
)
def test_rows_of_a_test_set_need_no_reply(row):
    assert to_prompt(row, format_of(row)) == {"messages": [user("q"), reply("")]}


def test_rows_of_a_test_set_without_a_prompt_are_rejected():
    with pytest.raises(Rejected, match="unknown row format"):
        to_prompt({"x": "y"}, format_of({"x": "y"}))


CALLING = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ({"messages": []}, "messages is empty", ""),
        ({"messages": [system("")]}, "messages is empty", ""),
        ({"messages": "hello"}, "messages is not a list", "text"),
        ({"messages": [user("q"), "a"]}, "a message is not an object", "message 2"),
        ({"messages": [user("q")]}, "no assistant turn", "user"),
        ({"messages": [system("s")]}, "no assistant turn", "system"),
        ({"messages": [user("q"), reply("a"), user("q")]}, "the last message is not the assistant's", ""),
        ({"messages": [user("q"), system("s"), reply("a")]}, "a system message that is not the first", ""),
        ({"messages": [user("q"), {"role": "critic", "content": "3"}, reply("a")]}, "unknown role", "'critic'"),
        ({"messages": [user("q"), {"content": "a"}]}, "unknown role", "its keys are content"),
        (
            {"messages": [user([{"type": "text", "value": "q"}]), reply("a")]},
            "content is not text",
            "keys are type, value",
        ),
        ({"messages": str([user("q"), reply("a")])}, "broken JSON", "save them as Parquet or JSON"),
        ({"messages": [user("q"), {"role": ["user"], "content": "a"}]}, "unknown role", "a list"),
        ({"messages": [user("q"), reply(None)]}, "content is not text", "nothing"),
        ({"messages": [user("q"), reply(" \n")]}, "content is empty", "assistant message 2"),
        ({"messages": [user([]), reply("a")]}, "content is empty", "user message 1"),
        ({"messages": [user(["q"]), reply("a")]}, "content is not text", "holds text"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}]), reply("a")]},
            "content has a part that is not text",
            "'image_url'",
        ),
        ({"messages": [user([{"type": "text", "text": None}]), reply("a")]}, "content is not text", "holds nothing"),
        ({"messages": [user("q"), reply("a")], "images": ["x.png"]}, "images, audio and video", "'images'"),
        ({"messages": [user("q"), reply("a", tool_calls=[{}])]}, "broken tool call", "no name"),
        ({"messages": [user("q"), reply("a", tool_calls="{")]}, "broken JSON within the row", "message 2"),
        ({"messages": [user("q"), {**CALLING, "tool_calls": [call("f", "{")]}]}, "broken JSON", "arguments of f"),
        ({"messages": [user("q"), {**CALLING, "tool_calls": [call("f", '{"a": NaN}')]}]}, "broken JSON", "NaN"),
        ({"messages": [user("q"), {**CALLING, "tool_calls": [call("f", "[1]")]}]}, "broken tool call", "a list"),
        (
            {"messages": [user("q"), {**CALLING, "tool_calls": [{"type": "code", "function": {"name": "f"}}]}]},
            "broken tool call",
            "'code'",
        ),
        ({"messages": [user("q"), result("3"), reply("a")]}, "a tool result without a tool call", "message 2"),
        (
            {
                "messages": [
                    user("q"),
                    {**CALLING, "tool_calls": [call("f", {}, id="1")]},
                    result("r", tool_call_id="2"),
                    reply("a"),
                ]
            },
            "a tool result without a tool call",
            "answers '2'",
        ),
        ({"messages": [user("q"), reply("a")], "tools": "[{"}, "broken JSON within the row", "tools"),
        ({"messages": [user("q"), reply("a")], "tools": [{}]}, "tools are not a list", "tool 1 has no name"),
        ({"messages": [user("q"), reply("a")], "tools": 3}, "tools are not a list", "a number"),
        (
            {"messages": [{**system("s"), "tools": [{"name": "f"}]}, user("q"), reply("a")]},
            "'tools' within a message",
            "column",
        ),
        ({"messages": "[{"}, "broken JSON within the row", "messages"),
        ({"messages": [{**user("q"), "reasoning": "r"}, reply("a")]}, "only an assistant message", "user message 1"),
        ({"messages": [user("q"), reply("a", weight=0.5)]}, "a weight or train mark other than 0 and 1", "0.5"),
        ({"messages": [user("q"), reply("a", train="no")]}, "a weight or train mark other than 0 and 1", "'no'"),
        ({"messages": [user("q"), reply("a", weight=0)]}, "no reply to train on", ""),
        ({"question": "q", "answer": None}, "content is not text", "answer is nothing"),
        ({"question": "q", "answer": ["a", "b"]}, "several answers to choose from", "the first is 'a'"),
        ({"instruction": "", "input": None, "output": "o"}, "content is empty", "instruction"),
        ({"instruction": "i", "output": "o", "history": "h"}, "history is not a list", "text"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "history is not a list", "entry 1"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "hm"}]},
            "broken JSON",
            "",
        ),
        ({"text": 3}, "content is not text", "text is a number"),
        ({"x": "a"}, "unknown row format", "columns x; known are messages"),
        ({}, "unknown row format", "columns none"),
    ],
)
def test_unusable_rows_have_a_reason_to_act_on(row, kind, detail):
    with pytest.raises(Rejected) as caught:
        read(row)
    assert kind in caught.value.kind
    assert detail in str(caught.value)


def test_a_named_format_says_which_columns_it_needs():
    with pytest.raises(
        Rejected, match="row format alpaca are missing: it has instruction . output; found answer, quest"
    ):
        read({"question": "q", "answer": "a"}, "alpaca")


def test_a_transcript_must_start_with_what_is_asked():
    with pytest.raises(Rejected, match="must start with `Human:`"):
        read({"chosen": "so\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, "preference")
    with pytest.raises(Rejected, match="needs a `prompt` column"):
        read({"chosen": "a", "rejected": "b"}, "preference")


def test_formats_are_looked_for_in_an_order_in_which_none_hides_another():
    """A format whose columns hold another's must come first."""
    forms = list(ROW_FORMATS.values())
    for number, form in enumerate(forms):
        assert not any(set(form.known_by) > set(earlier.known_by) for earlier in forms[:number]), form.name


def test_an_unknown_format_is_refused():
    with pytest.raises(UserError, match="rows: there is no row format 'dialog'; known are messages, sharegpt"):
        read({"question": "q"}, "dialog")
    assert row_format_names() == ("auto", *ROW_FORMATS)


SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize("history", [SAID, [["x", "y"]]])
@pytest.mark.parametrize("column", ["history", "chat_history"])
def test_what_was_said_before_stands_before_the_question(history, column):
    for row in ({"question": "q", "answer": "b"}, {"prompt": "q", "completion": "b"}, {"input": "q", "output": "b"}):
        assert messages_of({**row, column: history}) == [*SAID, user("q"), reply("b")]
    assert messages_of({"question": "q", "answer": "b", column: []}) == [user("q"), reply("b")]


def test_messages_that_nothing_reads_are_asked_about():
    row = {"question": "q", "answer": "b", "earlier": SAID}
    with pytest.raises(Rejected, match="`columns: {chat_history: earlier}` has them stand before it"):
        read(row)
    assert messages_of(row, columns={"chat_history": "earlier"}) == [*SAID, user("q"), reply("b")]
    assert messages_of(row, "question_answer") == [user("q"), reply("b")]
    with pytest.raises(Rejected, match="`columns: {chat_history: context}`"):
        read({"question": "q", "answer": "b", "context": SAID})


def test_a_reply_that_is_calls_is_one_of_the_assistants():
    calls = [{"name": "f", "arguments": {"x": 1}}, {"type": "function", "function": {"name": "g", "arguments": "{}"}}]
    found = messages_of({"question": "q", "answer": calls, "tools": [{"name": "f"}]})
    assert found[1] == reply("", tool_calls=[call("f", {"x": 1}), call("g", {})])


def test_instructions_beside_a_list_of_messages_are_the_system_message():
    row = {"instructions": "s", "input": [user("q")], "output": "a"}
    assert messages_of(row) == [system("s"), user("q"), reply("a")]
    assert messages_of({**row, "instructions": None}) == [user("q"), reply("a")]
    assert messages_of({"instructions": "s", "input": "i", "output": "a"}) == [user("s\n\ni"), reply("a")]


LOGGED = {
    "id": 1,
    "request": {"system": "s", "messages": [user("q")], "tools": [{"name": "f", "input_schema": {"type": "object"}}]},
    "response": {"content": [{"type": "text", "text": "Wait. "}, {"type": "tool_use", "name": "f", "input": {"x": 1}}]},
}
TOLD = {"prompt": "request.messages", "completion": "response.content", "system": "request.system"}


@pytest.mark.parametrize("as_text", [False, True])
def test_columns_may_stand_within_others(as_text):
    row = {**LOGGED, "request": json.dumps(LOGGED["request"])} if as_text else LOGGED
    found = read(row, columns={**TOLD, "tools": "request.tools"})
    assert found["messages"] == [system("s"), user("q"), reply("Wait. ", tool_calls=[call("f", {"x": 1})])]
    assert found["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    source = format_of(row, columns=TOLD)
    assert {"request", "response"} <= source.own_columns()
    whole = {"trace": {"messages": [user("q"), reply("a", odd=1)]}}
    assert messages_of(whole, columns={"messages": "trace.messages"}) == [user("q"), reply("a")]
    notes = list(notes_of(whole, format_of(whole, columns={"messages": "trace.messages"})))
    assert notes == ["nothing reads the key 'odd' of messages"]


def test_a_column_within_another_that_is_nowhere_is_refused():
    with pytest.raises(UserError, match=r"`columns: {messages: reply.messages}` names a column that no row has"):
        format_of(LOGGED, columns={"messages": "reply.messages"})
    with pytest.raises(Rejected, match="messages is not a list: found nothing"):
        read(LOGGED, columns={"messages": "request.turns"})
    with pytest.raises(Rejected, match=r"messages stand in request.messages: `columns: {messages: request.messages}`"):
        read(LOGGED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_path", "a/b.PNG"), ("img", {"bytes": None, "path": "a.jpg"}), ("Audio File", ["a.wav"]),
        ("video_url", "https://h/v.mp4"), ("photo", "data:image/png;base64,xx"), ("images", "x"),
    ],
)  # fmt: skip
def test_rows_about_an_image_or_a_sound_are_refused_whatever_its_column_is_called(name, value):
    row = {"question": "What is it?", "answer": "a car", name: value}
    with pytest.raises(Rejected, match=f"images, audio and video are not read: the column '{name}'"):
        read(row)
    if name != "images":
        assert messages_of(row, "question_answer")[-1] == reply("a car")
    assert messages_of({**row, name: None})[-1] == reply("a car")


@pytest.mark.parametrize(("name", "value"), [("photo", "a red car"), ("image_id", 3), ("url", "https://h/a.png")])
def test_words_about_an_image_and_addresses_are_none(name, value):
    assert messages_of({"question": "What is it?", "answer": "a car", name: value})[-1] == reply("a car")


def test_a_large_table_that_nothing_reads_is_asked_about():
    table = {"header": ["a"], "rows": [["x" * 50]] * 6}
    with pytest.raises(Rejected, match="nothing reads the column sheet, a long text"):
        read({"question": "What is it?", "answer": "a car", "sheet": table})


def test_preferences_of_openai_are_read_by_columns():
    row = {
        "input": {"messages": [user("q")], "tools": []},
        "preferred_output": [reply("a")],
        "non_preferred_output": [reply("b")],
    }
    with pytest.raises(Rejected, match=r"messages stand in input.messages"):
        read(row)
    names = {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    assert messages_of(row, "preference", names) == [user("q"), reply("a")]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"text": ["a", "a"], "answer_start": [1, 2]}, "a"),
        ([{"text": "a", "answer_start": 1}], "a"),
        (["a"], "a"),
        ([{"text": "a"}, {"text": "b"}], "ab"),  # parts of one text
        ("a", "a"),
    ],
)
def test_a_list_of_possible_answers_is_one_where_all_are_alike(answers, expected):
    assert messages_of({"context": "c", "question": "q", "answers": answers}) == [user("c\n\nq"), reply(expected)]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["a", "b"], "several answers to choose from"),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, r'several answers.*`completion: "\{….text.0\}"` takes that one'),
        ([{"text": "a", "score": 3}, {"text": "b", "score": 1}], "several answers"),
        ({"text": [], "answer_start": []}, "content is empty"),
    ],
)
def test_answers_that_differ_or_are_none_are_refused(answers, reason):
    with pytest.raises(Rejected, match=reason):
        read({"question": "q", "answers": answers})


CALLS = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]


@pytest.mark.parametrize("answers", [json.dumps(CALLS), CALLS, json.dumps(CALLS[0]), CALLS[0]])
def test_a_reply_that_is_calls_beside_tools_calls_them(answers):
    row = {"query": "q", "answers": answers, "tools": json.dumps([{"name": "f"}, {"name": "g"}])}
    expected = [call("f", {"x": 1}), call("g", {})] if answers in (CALLS, json.dumps(CALLS)) else [call("f", {"x": 1})]
    assert messages_of(row) == [user("q"), reply("", tool_calls=expected)]


def test_json_without_tools_or_that_is_no_call_stays_a_text():
    assert messages_of({"query": "q", "answers": json.dumps(CALLS)})[1] == reply(json.dumps(CALLS))
    row = {"query": "q", "answers": '[{"a": 1}]', "tools": [{"name": "f"}]}
    assert messages_of(row)[1] == reply('[{"a": 1}]')
