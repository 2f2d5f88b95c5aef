"""The documentation's table of row formats is that of the registry."""

from adder.formatting.row_formats import ROW_FORMATS
from adder.workflow import row_format_docs


def test_every_row_format_has_a_row():
    rows = row_format_docs.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(ROW_FORMATS)
    assert any(row.startswith("| `question_answer` | `question`, `answer`; `context`") for row in rows)
