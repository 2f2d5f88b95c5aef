"""The documentation's tables of row formats and of forms are those of the registry and of what reading does."""

import pytest

from adder.formatting.row_formats import ROW_FORMATS
from adder.workflow import row_format_docs
from adder.workflow.row_format_docs import COLUMNS, FORMS, ITSELF, NAMED, REFUSED, TEMPLATE, VALUES, Form, read


def test_every_row_format_has_a_row():
    rows = row_format_docs.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(ROW_FORMATS)
    assert any(row.startswith("| `question_answer` | `question`, `answer`; `context`") for row in rows)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.how} {'+'.join(form.row)}")
def test_a_form_is_read_as_the_table_says(form):
    became = read(form)
    if form.how == REFUSED:
        assert isinstance(became, str) and len(became.split()) > 2
        return
    assert not isinstance(became, str), became
    messages = [message for message in became.get("messages", []) if message["role"] != "tool"]
    said = {message["role"]: message["content"] or message.get("tool_calls") for message in messages}
    asked = became.get("text") or said["user"]
    assert ("Q" in asked or "T" in asked) and (not said or said["assistant"])
    if form.settings:  # and not without them
        assert isinstance(read(Form(form.row, REFUSED)), str) or "system" in form.settings


def test_every_row_format_and_every_way_has_a_form():
    assert {form.how for form in FORMS} == {ITSELF, COLUMNS, NAMED, TEMPLATE, VALUES, REFUSED}
    known = [set(form.row) for form in FORMS if form.how in (ITSELF, NAMED)]
    missing = [
        name for name, form in ROW_FORMATS.items() if not any(there.issuperset(form.known_by) for there in known)
    ]
    assert not missing


def test_a_form_that_is_read_otherwise_stops_the_documentation(monkeypatch):
    monkeypatch.setattr(row_format_docs, "FORMS", (Form({"question": "Q", "answer": "A"}, REFUSED),))
    with pytest.raises(ValueError, match="is not read refused"):
        row_format_docs.forms()
