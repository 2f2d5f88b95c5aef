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
NAMED = "by name"


class Form(NamedTuple):
    """A form that rows come in: an example, the settings of its source, and how it is read, one of the above."""

    row: Row
    how: str
    settings: Mapping[str, Any] = {}


def _said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


TALK = [_said("user", "Q"), _said("assistant", "A")]
FORMS = (
    Form({"messages": TALK}, ITSELF),
    Form({"messages": [_said("user", "Q"), _said("assistant", "A", weight=0), *TALK]}, ITSELF),
    Form({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"}, ITSELF),
    Form({"conversation": [{"human": "Q", "assistant": "A"}]}, ITSELF),
    Form({"instruction": "Q", "input": "I", "output": "A"}, ITSELF),
    Form({"prompt": "Q", "completion": "A"}, ITSELF),
    Form({"prompt": TALK[:1], "completion": TALK[1:]}, ITSELF),
    Form({"question": "Q", "answer": "A", "context": "C"}, ITSELF),
    Form({"question": "Q", "choices": ["x", "y"], "answer": "B"}, ITSELF),
    Form({"Problem": "Q", "Solution": "A"}, ITSELF),
    Form({"question": "Q", "answer": {"x": 1}}, ITSELF),
    Form({"text": "T", "url": "U"}, ITSELF),
    Form({"frage": "Q", "antwort": "A"}, COLUMNS, {"columns": {"question": "frage", "answer": "antwort"}}),
    Form(
        {"problem": "Q", "solution": "X", "answer": "A"},
        COLUMNS,
        {"columns": {"question": "problem", "answer": "answer"}},
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
    Form({"frage": "Q", "antwort": "A"}, REFUSED),
    Form({"problem": "Q", "solution": "X", "answer": "A"}, REFUSED),
    Form({"question": "Q", "optA": "x", "optB": "y", "answer": "B"}, REFUSED),
    Form({"prompt": "Q", "chosen": "A", "rejected": "B"}, REFUSED),
    Form({"prompt": "Q", "completion": "A", "label": 1}, REFUSED),
    Form({"prompt": "Q", "completion": "A", "label": False}, REFUSED),
    Form({"text": "T", "summary": "U"}, REFUSED),
    Form({"question": "Q", "answer": "A", "image": "a.png"}, REFUSED),
    Form({"messages": TALK[:1]}, REFUSED),
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
    sets = Counter({tuple(form.row): 1})
    try:
        fields = row_fields("rows", reading, form.row.keys())
        source = source_format("rows", reading["row_format"], reading["columns"], sets, fields=fields)
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
    return f"{message['role']} `{text}`{unlearnt}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
