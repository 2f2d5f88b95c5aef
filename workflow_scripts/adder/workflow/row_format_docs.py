"""The tables of row formats and of forms of rows in docs/data.md, made from the registry and by reading examples."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import yaml

from adder.core.errors import UserError
from adder.data.records import Reading
from adder.formatting.conversation import Conversation, Message
from adder.formatting.rejected import Rejected
from adder.formatting.row_fields import row_fields
from adder.formatting.row_formats import ROW_FORMATS, source_format, to_conversation

Row = Mapping[str, Any]
ITSELF, COLUMNS, TEMPLATE, REFUSED = "by itself", "by `columns`", "by template", "refused"
NAMED, VALUES = "by name", "by `values`"


class Form(NamedTuple):
    """A form that rows come in: an example, the settings of its source, and how it is read, one of the above."""

    row: Row
    how: str
    settings: Mapping[str, Any] = {}


def _said(role: str, text: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


TALK = [_said("user", "Q"), _said("assistant", "A")]
FORMS = (
    Form({"messages": TALK}, ITSELF),
    Form({"messages": [_said("user", "Q"), _said("assistant", "A", weight=0), *TALK]}, ITSELF),
    Form({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"}, ITSELF),
    Form({"conversation": [{"human": "Q", "assistant": "A"}]}, ITSELF),
    Form(
        {
            "system": "S",
            "messages": [
                _said("user", "Q"),
                _said("assistant", [{"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]),
                _said("user", [{"type": "tool_result", "tool_use_id": "1", "content": "R"}]),
                _said("assistant", [{"type": "text", "text": "A"}]),
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        },
        ITSELF,
    ),
    Form(
        {
            "systemInstruction": {"parts": [{"text": "S"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Q"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"x": 1}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"y": 2}}}]},
                {"role": "model", "parts": [{"text": "A"}]},
            ],
        },
        ITSELF,
    ),
    Form(
        {
            "instructions": "S",
            "input": [_said("user", "Q")],
            "output": [
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
                {"type": "function_call_output", "call_id": "1", "output": "R"},
                _said("assistant", [{"type": "output_text", "text": "A"}], type="message"),
            ],
        },
        ITSELF,
    ),
    Form(
        {
            "messages": [
                _said("user", [{"text": "Q"}]),
                _said("assistant", [{"toolUse": {"toolUseId": "1", "name": "f", "input": {"x": 1}}}]),
                _said("user", [{"toolResult": {"toolUseId": "1", "content": [{"json": {"y": 2}}]}}]),
                _said("assistant", [{"text": "A"}]),
            ],
            "toolConfig": {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}]},
        },
        ITSELF,
    ),
    Form(
        {
            "messages": [
                _said("user", "Q"),
                _said("assistant", None, function_call={"name": "f", "arguments": '{"x": 1}'}),
                _said("function", "R", name="f"),
                _said("assistant", "A"),
            ],
            "functions": [{"name": "f"}],
        },
        ITSELF,
    ),
    Form({"chat_history": [{"role": "USER", "message": "Q"}, {"role": "CHATBOT", "message": "A"}]}, ITSELF),
    Form({"messages": [{"type": "human", "content": "Q"}, {"type": "ai", "content": "A"}]}, ITSELF),
    Form({"input_text": "Q", "output_text": "A"}, ITSELF),
    Form({"instruction": "Q", "input": "I", "output": "A"}, ITSELF),
    Form({"question": "Q", "answer": "A", "chat_history": [["Q1", "A1"]]}, ITSELF),
    Form({"prompt": "Q", "completion": "A"}, ITSELF),
    Form({"prompt": TALK[:1], "completion": TALK[1:]}, ITSELF),
    Form({"question": "Q", "answer": "A", "context": "C"}, ITSELF),
    Form({"question": "Q", "choices": ["x", "y"], "answer": "B"}, ITSELF),
    Form({"Problem": "Q", "Solution": "A"}, ITSELF),
    Form({"question": "Q", "answer": {"x": 1}}, ITSELF),
    Form({"context": "C", "question": "Q", "answers": {"text": ["A"], "answer_start": [0]}}, ITSELF),
    Form(
        {"query": "Q", "tools": '[{"name": "f"}]', "answers": '[{"name": "f", "arguments": {"x": 1}}]'},
        ITSELF,
    ),
    Form({"table": {"header": ["H"], "rows": [["C"]]}, "question": "Q", "answer": "A"}, ITSELF),
    Form({"text": "T", "url": "U"}, ITSELF),
    Form({"frage": "Q", "antwort": "A"}, COLUMNS, {"columns": {"question": "frage", "answer": "antwort"}}),
    Form(
        {"problem": "Q", "solution": "X", "answer": "A"},
        COLUMNS,
        {"columns": {"question": "problem", "answer": "answer"}},
    ),
    Form(
        {"request": {"messages": TALK[:1]}, "response": {"content": "A"}},
        COLUMNS,
        {"columns": {"prompt": "request.messages", "completion": "response.content"}},
    ),
    Form({"prompt": "Q", "completion": "A", "label": 1}, COLUMNS, {"columns": {"kto_tag": "label"}}),
    Form({"prompt": "Q", "chosen": "A", "rejected": "B"}, NAMED, {"row_format": "preference"}),
    Form({"text": "T", "summary": "U"}, NAMED, {"row_format": "text"}),
    Form({"text": "T", "summary": "U"}, TEMPLATE, {"prompt": "Sum up: {text}", "completion": "{summary}"}),
    Form({"q": "Q", "answers": {"text": ["A"]}}, TEMPLATE, {"prompt": "{q}", "completion": "{answers.text.0}"}),
    Form({"question": "Q", "answer": "A", "tone": "kind"}, TEMPLATE, {"system": "Be {tone}."}),
    Form(
        {"messages": [{"speaker": "customer", "text": "Q"}, {"speaker": "agent", "text": "A"}]},
        TEMPLATE,
        {"message_keys": {"role": "speaker", "content": "text"}, "roles": {"user": "customer", "assistant": "agent"}},
    ),
    Form({"question": "Q", "choices": ["x", "y"], "answer": 1}, VALUES, {"values": {"answer": {0: "A", 1: "B"}}}),
    Form(
        {"text": "T", "label": 0},
        TEMPLATE,
        {"prompt": "{text}", "completion": "{label}", "values": {"label": {0: "bad", 1: "good"}}},
    ),
    Form({"frage": "Q", "antwort": "A"}, REFUSED),
    Form({"translation": {"en": "E", "de": "D"}}, REFUSED),
    Form({"goal": "Q", "sol1": "x", "sol2": "y", "label": 1}, REFUSED),
    Form({"question": "Q", "choices": ["x", "y"], "answer": 1}, REFUSED),
    Form({"text": "### Human: Q### Assistant: A"}, REFUSED),
    Form({"request": {"messages": TALK[:1]}, "response": {"content": "A"}}, REFUSED),
    Form({"problem": "Q", "solution": "X", "answer": "A"}, REFUSED),
    Form({"question": "Q", "optA": "x", "optB": "y", "answer": "B"}, REFUSED),
    Form({"prompt": "Q", "chosen": "A", "rejected": "B"}, REFUSED),
    Form({"prompt": "Q", "completion": "A", "label": 1}, REFUSED),
    Form({"prompt": "Q", "completion": "A", "label": False}, REFUSED),
    Form({"text": "T", "summary": "U"}, REFUSED),
    Form({"question": "Q", "answer": "A", "image": "a.png"}, REFUSED),
    Form({"messages": TALK[:1]}, REFUSED),
    Form({"contents": [{"role": "user", "parts": [{"inlineData": {"mimeType": "image/png"}}]}]}, REFUSED),
    Form(
        {
            "messages": [
                _said("user", "Q"),
                _said("assistant", [{"type": "tool_use", "name": "f"}, {"type": "text", "text": "A"}]),
            ]
        },
        REFUSED,
    ),
    Form({"question": "Q", "answer": ""}, REFUSED),
)


def table() -> str:
    """Return a Markdown table of all row formats, in the order in which they are looked for: name, columns."""
    rows = [f"| `{name}` | {form.meaning} |" for name, form in ROW_FORMATS.items()]
    return "| format | columns |\n|---|---|\n" + "\n".join(rows)


def forms() -> str:
    """Return a Markdown table of the forms: an example, how it is read, and what it becomes or why it is refused.

    Raises ValueError where a form isn't read as FORMS says.
    """
    lines = ["| a row such as | is read | as |", "|---|---|---|"]
    for form in FORMS:
        became = read(form)
        if isinstance(became, str) != (form.how == REFUSED):
            raise ValueError(f"{form.row} is not read {form.how}: {became}")
        settings = _cell(yaml.safe_dump(dict(form.settings), default_flow_style=True, width=1000).strip()[1:-1])
        how = f"{form.how}: `{settings}`" if form.settings else form.how
        lines.append(f"| `{_cell(json.dumps(form.row))}` | {how} | {_cell(_in_words(became))} |")
    return "\n".join(lines)


def read(form: Form) -> Conversation | str:
    """What an example becomes in a source of such rows, or why it is refused."""
    reading: Reading = {"row_format": "auto", "columns": {}, "weight": 1.0, "split": None}
    settings = dict(form.settings)
    if "roles" in settings:
        settings["roles"] = {theirs: ours for ours, theirs in settings["roles"].items()}
    reading = cast(Reading, {**reading, **settings})
    named = settings.get("values", {})
    values = {column: {str(value): name for value, name in names.items()} for column, names in named.items()}
    sets = Counter({tuple(form.row): 1})
    try:
        fields = row_fields("rows", reading, form.row.keys())
        source = source_format("rows", reading["row_format"], reading["columns"], sets, fields=fields, values=values)
        return to_conversation(form.row, source)
    except (Rejected, UserError) as error:
        return str(error)


def _in_words(became: Conversation | str) -> str:
    if isinstance(became, str):
        return became.removeprefix("rows: ").split("\n")[0].split("; known are ")[0].rstrip(":")
    if "text" in became:
        return f"a text to learn: `{became['text']}`"
    return ", ".join(_in_short(message) for message in became.get("messages", []))


def _in_short(message: Message) -> str:
    text = message["content"].replace("\n", "\\n")
    unlearnt = " (not learnt)" if message.get("train") is False else ""
    calls = "".join(
        f" with the call `{call['function']['name']}({json.dumps(call['function']['arguments'])})`"
        for call in message.get("tool_calls", [])
    )
    said = f"`{text}`" if text or not calls else ""
    return f"{message['role']} {said}{calls}{unlearnt}".replace("  ", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
