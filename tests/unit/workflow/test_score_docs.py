"""The documentation's table of scores is that of the registry."""

from pathlib import Path

from adder.evaluation.metrics import SCORES
from adder.workflow import score_docs

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert score_docs.filled(page) == page, "run `make settings`"


def test_every_score_has_a_row():
    rows = score_docs.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(SCORES)
    assert "| `field_f1` | Field F1 | each reference is a JSON object, or `json` | higher | values inside" in rows[1]
