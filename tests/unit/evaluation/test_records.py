"""What the report's tests read as an evaluation's files has the keys of its records: the fixture is no other form."""

from adder.core.files import read_json, read_jsonl
from adder.evaluation.metrics import SCORES
from adder.evaluation.records import SampleRecord, ScoresRecord
from report_fixture import write_stage_folders


def test_scores_and_samples(tmp_path):
    _, inputs = write_stage_folders(tmp_path)
    folder = inputs["evaluate_tuned"]
    scores = read_json(folder / "scores.json")
    assert {"model", "heldout"} <= scores.keys() <= ScoresRecord.__annotations__.keys()
    assert set(scores["heldout"]) <= SCORES.keys() | {"fields"}
    for row in read_jsonl(folder / "samples.jsonl"):
        assert {"id", "reference", "loss"} <= row.keys() <= SampleRecord.__annotations__.keys() | SCORES.keys()
