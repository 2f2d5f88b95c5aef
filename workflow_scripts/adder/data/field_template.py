"""Templates of a source's settings, such as `{context}\\n\\n{question}`: text with columns in braces.

Light to import: the workflow is parsed with it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Field(NamedTuple):
    """A column in a template, as it is written, and where the value stands: the column, and keys and places within."""

    written: str
    column: str
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class FieldTemplate:
    """Text and columns in turn."""

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> list[Field]:
        """The columns in it, in order."""
        return [part for part in self.parts if isinstance(part, Field)]

    def bound(self, columns: Collection[str]) -> "FieldTemplate":
        """The template with each field's column found among those there are.

        A name in braces is a column, in any case and with `_` for spaces and hyphens, or a column and, after dots, keys
        and places within its value: `{answers.text.0}`. Raises KeyError with the field that names no column.
        """
        parts = [_bound(part, columns) if isinstance(part, Field) else part for part in self.parts]
        return replace(self, parts=tuple(parts))


def parse(template: str) -> FieldTemplate:
    """The template of a text; `{{` and `}}` stand for braces. Raises ValueError for a brace that is neither."""
    parts: list[str | Field] = []
    place = 0
    for match in FIELD.finditer(template):
        parts.append(template[place : match.start()])
        place = match.end()
        name = (match[1] or "").strip()
        if match[0] in ("{{", "}}"):
            parts.append(match[0][0])
        elif name:
            parts.append(Field(name, name))
        else:
            raise ValueError(
                f"has {match[0]!r} at character {match.start() + 1}, which names no column; "
                "{question} stands for the column question, {{ and }} for braces"
            )
    parts.append(template[place:])
    return FieldTemplate(tuple(part for part in parts if part))


def nested(name: str, columns: Collection[str]) -> Field | None:
    """Where a name with dots, such as `request.messages`, points to within one of the columns; None for other names."""
    if "." not in name or name in columns:
        return None
    try:
        field = _bound(Field(name, name), columns)
    except KeyError:
        return None
    return field if field.path else None


def folded(name: str) -> str:
    """A column's name as names are compared."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _bound(field: Field, columns: Collection[str]) -> Field:
    names = field.written.split(".")
    for length in range(len(names), 0, -1):
        column = _column(".".join(names[:length]), columns)
        if column is not None:
            return Field(field.written, column, tuple(names[length:]))
    raise KeyError(field.written)


def _column(name: str, columns: Collection[str]) -> str | None:
    if name in columns:
        return name
    alike = [column for column in columns if folded(column) == folded(name)]
    return alike[0] if len(alike) == 1 else None
