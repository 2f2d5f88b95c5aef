"""The documentation's table of row formats is that of the registry."""

from pathlib import Path

from adder.formatting.row_formats import ROW_FORMATS
from adder.workflow import row_format_docs

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert row_format_docs.filled(page) == page, "run `make settings`"


def test_every_row_format_has_a_row():
    rows = row_format_docs.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(ROW_FORMATS)
    assert "| `question_answer` | `question`, `answer` |" in rows
