"""The Parquet files: rows as often as their weight says, in row groups of a size to share out."""

from collections import Counter, defaultdict

import pyarrow.parquet as pq

from adder.formatting import block_converter, conversation_file
from format_stage import (
    QUESTIONS,
    format_rows,
    qa,
)


def test_weights_repeat_and_leave_out_training_rows(tmp_path):
    rows = [
        {"source": name, "row": n, "split": split, "data": qa(f"{name} {n}")}
        for name, split in (("half", "train"), ("once", "train"), ("more", "train"), ("held", "heldout"))
        for n in range(1, 401)
    ]
    reading = {"half": {"weight": 0.5}, "more": {"weight": 2.25}, "held": {"weight": 3.0}}
    formatted = format_rows(tmp_path, rows, reading=reading)
    card = formatted.card
    assert 160 < card["by_source"]["half"]["train"] < 240
    assert card["left_out"] == card["by_source"]["half"]["left_out"] == 400 - card["by_source"]["half"]["train"]
    assert card["heldout"] == 400
    copies = Counter(row["id"].split("#")[0] for row in formatted.train if row["source"] == "more")
    assert len(copies) == 400 and set(copies.values()) == {2, 3}
    assert 60 < sum(count == 3 for count in copies.values()) < 140
    assert card["repeats"] == sum(copies.values()) - 400
    assert {"more:1", "more:1#2"} <= set(formatted.ids("train"))
    digests = [row["digest"] for row in formatted.train]
    assert len(set(digests)) == len(digests)
    by_row = defaultdict(set)
    for row in formatted.train:
        by_row[row["id"].split("#")[0]].add(row["conversation"])
    assert all(len(conversations) == 1 for conversations in by_row.values())

    fewer = format_rows(tmp_path / "fewer", [row for row in rows if row["row"] <= 200], reading=reading)
    kept = {row["id"] for row in formatted.train if int(row["id"].split(":")[1].split("#")[0]) <= 200}
    assert kept == {row["id"] for row in fewer.train}  # other rows don't matter


def test_row_groups_are_of_a_size_to_share_out(tmp_path, monkeypatch):
    monkeypatch.setattr(block_converter, "BLOCK", 2_000)
    monkeypatch.setattr(conversation_file, "GROUP_ROWS", 100)
    formatted = format_rows(tmp_path, [qa(q) for q in QUESTIONS], {"size": 3})
    groups = pq.ParquetFile(formatted.out / "train.parquet").metadata
    sizes = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
    assert max(sizes) <= 100 and sum(sizes) == 397
    assert formatted.ids("train") == sorted(formatted.ids("train"), key=lambda identity: int(identity.split(":")[1]))
