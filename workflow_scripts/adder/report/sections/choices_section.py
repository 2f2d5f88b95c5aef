"""The report's view of what Adder chose by itself, and why."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adder.report.formatting import HEADINGS, heading
from adder.report.page_section import PageSection, RunReport, View
from adder.report.resolved_settings import choices

# Choices whose alternatives stand in a section of their own.
TABLES_ELSEWHERE = ("lengths.max_seq_length", "train.frozen_products", "merge.base")


class TableRow(NamedTuple):
    """An alternative: whether it was chosen, and (name of the column, value) of each cell."""

    chosen: bool
    cells: list[tuple[str, Any]]


class Table(NamedTuple):
    """What was weighed in a choice."""

    columns: list[str]
    rows: list[TableRow]


class ShownChoice(NamedTuple):
    """A choice, and its alternatives where they stand nowhere else."""

    key: str
    value: Any
    reason: str
    table: Table | None


def view(run: RunReport) -> View:
    """Every choice but those whose setting somebody gave."""
    given = {row.key for row in run.settings.resolved if row.value != "auto"}
    return {
        "choices": [
            ShownChoice(
                choice.key,
                choice.value,
                choice.reason,
                None if choice.key in TABLES_ELSEWHERE else table(choice.alternatives),
            )
            for choice in choices(run.facts)
            if choice.key not in given
        ]
    }


def table(alternatives: Sequence[Mapping[str, Any]], key: str | None = None, value: Any = None) -> Table | None:
    """Rows and columns of a choice's alternatives; the row whose `key` is `value` is the chosen one."""
    if not alternatives:
        return None
    found = list(dict.fromkeys(name for row in alternatives for name in row))
    # Files have their keys sorted; people read a candidate's name first, then what it would cost.
    columns = [name for name in HEADINGS if name in found] + [name for name in found if name not in HEADINGS]
    rows = [
        TableRow(key is not None and row.get(key) == value, [(name, row.get(name)) for name in columns])
        for row in alternatives
    ]
    return Table([heading(name) for name in columns], rows)


SECTION = PageSection(name="choices", anchor="choices", title="Choices", view=view)
