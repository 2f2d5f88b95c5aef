"""A stage's record has what the runner writes and the report reads."""

from pathlib import Path

from adder.core.file_digests import FileDigests
from adder.core.files import read_json
from adder.core.stage_record import StageMeaning, StageRecord
from adder.workflow import stage_runner


def test_the_runner_writes_what_is_described(tmp_path: Path):
    meaning: StageMeaning = {
        "stage": "data",
        "key": "k",
        "settings": {},
        "identity": {},
        "asked_versions": {},
        "inputs": {},
        "code": "c",
    }
    (tmp_path / "rows.jsonl").write_text("{}")
    digests = FileDigests(tmp_path / "cache" / "digests.json", tmp_path)
    stage_runner.finish(tmp_path, meaning, {"rows": 1}, 2.5, digests, attempts=3)
    record = read_json(tmp_path / "stage.json")
    assert StageRecord.__required_keys__ <= record.keys() <= StageRecord.__annotations__.keys()
    assert (record["attempts"], record["outputs"]["rows.jsonl"]["bytes"]) == (3, 2)
