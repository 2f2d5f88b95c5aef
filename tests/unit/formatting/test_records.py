"""card.json and the lists of dropped rows hold what their records promise."""

from adder.formatting.records import (
    Card,
    Counts,
    Duplicate,
    DuplicateExample,
    Leak,
    NearDuplicate,
    NearDuplicateExample,
    NearDuplicateFindings,
    OverlapExample,
    OverlapFindings,
    Quality,
    Reject,
)
from format_stage import SENTENCE, format_rows, numbered, qa


def test_the_files_have_the_keys_of_the_records(tmp_path):
    rows = [
        *(("train", qa(text)) for text in ("a", "a", "b", numbered(0, 60), numbered(0, 61), "well, " + SENTENCE)),
        ("train", qa("c", "")),
        *(("heldout", qa(text)) for text in ("b", SENTENCE)),
    ]
    found = format_rows(tmp_path, rows, near_duplicates="report", overlap="drop")
    assert found.card.keys() == Card.__required_keys__
    assert all(counts.keys() == Counts.__required_keys__ for counts in found.card["by_source"].values())
    for rows, record in (
        (found.rejects, Reject),
        (found.duplicates, Duplicate),
        (found.near_duplicates, NearDuplicate),
        (found.leaked, Leak),
    ):
        assert rows and all(row.keys() == record.__required_keys__ for row in rows), record
    quality = found.card["quality"]
    assert quality.keys() == Quality.__required_keys__
    assert quality["near_duplicates"].keys() == NearDuplicateFindings.__required_keys__
    assert quality["overlap"].keys() == OverlapFindings.__required_keys__
    for name, record in (
        ("duplicates", DuplicateExample),
        ("near_duplicates", NearDuplicateExample),
        ("overlap", OverlapExample),
    ):
        examples = quality[name]["examples"]
        assert examples and all(example.keys() == record.__required_keys__ for example in examples), name
