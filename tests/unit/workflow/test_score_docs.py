"""The documentation's table of scores is that of the registry."""

from adder.evaluation.metrics import SCORES
from adder.workflow import score_docs


def test_every_score_has_a_row():
    rows = score_docs.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(SCORES)
    assert "| `field_f1` | Field F1 | each reference is a JSON object, or `json` | higher | values inside" in rows[1]
