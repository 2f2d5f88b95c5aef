"""What a source's settings say of its rows beside a row format: templates of prompt, system and completion, and what
keys and roles of messages are called there.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adder.core.errors import UserError
from adder.data.field_template import Field, FieldTemplate, folded, parse
from adder.data.records import Reading
from adder.formatting.api_messages import as_json, is_data
from adder.formatting.column_names import asked_columns, reply_columns
from adder.formatting.messages import BLANK, as_text, is_message
from adder.formatting.rejected import Rejected, json_type
from adder.formatting.task_columns import OPTIONS, document_text, options_text

Row = Mapping[str, Any]
TEMPLATES = ("system", "prompt", "completion")
EMPTY = "content is empty"


@dataclass(frozen=True)
class RowFields:
    """templates: by what they make, bound to the source's columns. given: those that the settings have; the others are
    the column that is known for a prompt or a reply. message_keys: {ours: theirs}; roles: {theirs: ours}.
    """

    templates: Mapping[str, FieldTemplate]
    given: tuple[str, ...]
    message_keys: Mapping[str, str]
    roles: Mapping[str, str]

    @property
    def makes_pair(self) -> bool:
        """Whether prompt and reply are made by templates."""
        return "prompt" in self.templates or "completion" in self.templates

    def columns(self, *made: str) -> set[str]:
        """The columns that the templates of some of TEMPLATES read, of all without a name."""
        chosen = [self.templates[name] for name in made or TEMPLATES if name in self.templates]
        return {field.column for template in chosen for field in template.fields}

    def made(self, row: Row) -> dict[str, Any]:
        """What the templates make of one row, but what is empty of system and prompt. Raises Rejected."""
        found: dict[str, Any] = {}
        for name, template in self.templates.items():
            value = _filled(name, template, row)
            if value not in BLANK:
                found[name] = value
        return found

    def renamed(self, value: Any) -> Any:
        """Messages with our names for their keys and roles; what is none is left as it is."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value
        if isinstance(value, dict):
            return self._message(value)
        if isinstance(value, list):
            return [self._message(one) if isinstance(one, dict) else one for one in value]
        return value

    def described(self) -> dict[str, str]:
        """What each template is made of, in words."""
        made = {name: [field.written for field in template.fields] for name, template in self.templates.items()}
        return {
            name: f"made of {' and '.join(fields)}" if fields else "the same for all rows"
            for name, fields in made.items()
        }

    def notes(self, row: Row) -> Iterator[str]:
        """What is to be known of how the templates take one row."""
        for name, template in self.templates.items():
            values = [(field, value_of(field, row)) for field in template.fields]
            yield from (
                f"'{field.written}' in `{name}` is {json_type(value)}, written as JSON"
                for field, value in values
                if isinstance(value, bool | int | float)
                or (name == "completion" and _is_data(value))
                or (
                    isinstance(value, dict)
                    and not is_message(value)
                    and document_text(value, field.written).startswith("{")
                )
            )
            if len(values) > 1 or any(isinstance(part, str) for part in template.parts):
                yield from (f"'{field.written}' in `{name}` is empty" for field, value in values if _is_blank(value))

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        theirs = set(self.message_keys.values())
        found = {key: value for key, value in message.items() if key not in theirs}
        found |= {ours: message[their] for ours, their in self.message_keys.items() if their in message}
        for key in ("role", "from"):
            if key in found and isinstance(found[key], str | int):
                found[key] = self.roles.get(str(found[key]).strip().lower(), found[key])
        return found


def row_fields(source: str, reading: Reading, columns: Collection[str], protected: bool = False) -> RowFields | None:
    """What the settings of a source say of its rows, or None. columns: those of all its rows; without any, nothing is
    checked. protected: only what rows ask is of interest.

    Raises UserError for a template that names a column which no row has, and where one of prompt and completion is
    given and the other can't be told.
    """
    written: dict[str, str] = {name: text for name in TEMPLATES if (text := reading.get(name)) is not None}
    keys, roles = reading.get("message_keys", {}), reading.get("roles", {})  # roles in lower case
    if not written and not keys and not roles:
        return None
    templates = {name: _bound(source, name, parse(text), columns) for name, text in written.items()}
    found = RowFields(templates, tuple(templates), keys, roles)
    if not found.makes_pair or not columns:
        return found
    for name, known in (("prompt", asked_columns), ("completion", reply_columns)):
        if name in templates or (protected and name == "completion"):
            continue
        there = known(set(columns) - found.columns(), reading["columns"].values())
        if len(there) != 1:
            given, missing = ("completion", "prompt") if name == "prompt" else ("prompt", "reply")
            shown = f"it may be {', '.join(there)}" if there else "no column is known for it"
            raise UserError(
                f"{source}: only `{given}` is set, and which column is the {missing} can't be told: {shown}. Add "
                f"`{name}:` with it in braces. The columns there: {', '.join(sorted(columns)[:30])}"
            )
        templates = {**templates, name: FieldTemplate((Field(there[0], there[0]),))}
    return replace(found, templates=templates)


def _bound(source: str, name: str, template: FieldTemplate, columns: Collection[str]) -> FieldTemplate:
    try:
        return template.bound(columns) if columns else template
    except KeyError as error:
        raise UserError(
            f"{source}: `{name}` names the column '{error.args[0]}', which no row has. The columns there: "
            f"{', '.join(sorted(columns)[:30])}. Braces that name no column are written as {{{{ and }}}}"
        ) from None


def _filled(name: str, template: FieldTemplate, row: Row) -> Any:
    """A template's text; of a column alone its value as it is."""
    fields = template.fields
    values = {field: value_of(field, row) for field in fields}
    empty = [field for field, value in values.items() if _is_blank(value)]
    if len(template.parts) == 1 and fields and not empty:
        value = values[fields[0]]
        return as_json(value, fields[0].written) if name == "completion" and _is_data(value) else value
    if fields and (len(empty) == len(values) or (empty and name == "completion")):
        if name == "system":
            return None
        raise Rejected(EMPTY, f"`{name}`: the column {empty[0].written}")
    texts = [part if isinstance(part, str) else _text(values[part], part) for part in template.parts]
    return "".join(texts).strip() if empty else "".join(texts)


def value_of(field: Field, row: Row) -> Any:
    """The value that a field stands for in a row, also within the JSON text of a cell; None where there is none."""
    value = row.get(field.column)
    for step in field.path:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.lstrip("-").isdigit() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _is_data(value: Any) -> bool:
    """Whether a reply is a list of values that no reply is made of, and is learnt as JSON."""
    return is_data(value) or (isinstance(value, list) and all(isinstance(one, str | int | float) for one in value))


def _text(value: Any, field: Field) -> str:
    """A value as part of a text: options with their letters, documents one after the other, others as they are."""
    if _is_blank(value):
        return ""
    if folded(field.column) in OPTIONS and not isinstance(value, str) and not field.path:
        return options_text(value, field.written)
    return document_text(value, field.written) if isinstance(value, list | dict) else as_text(value, field.written)


def _is_blank(value: Any) -> bool:
    return value in (*BLANK, {}) or (isinstance(value, str) and not value.strip())
