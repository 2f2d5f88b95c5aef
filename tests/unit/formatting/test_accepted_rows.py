"""The accepted rows as arrays."""

import numpy as np

from adder.formatting.accepted_rows import CLASSES, LEAKED, AcceptedRows
from adder.formatting.block_converter import HELDOUT, TRAIN, UNDECIDED


def rows() -> AcceptedRows:
    return AcceptedRows(
        sources=["a", "b", "empty"],
        source=np.array([0, 1, 1, 0], np.int32),
        row=np.array([7, 1, 2, 9]),
        split=np.array([TRAIN, TRAIN, LEAKED, HELDOUT], np.int8),
        digest=np.zeros(4, np.uint64),
        prompt=np.zeros(4, np.uint64),
        value=None,
        signatures=np.zeros((0, 128), np.uint8),
        passage=np.zeros(4, np.uint64),
        reply=np.zeros(4, np.uint64),
    )


def test_rows_are_known_by_source_and_number():
    assert [rows().id(index) for index in range(4)] == ["a:7", "b:1", "b:2", "a:9"]


def test_every_row_is_counted_in_its_class_of_its_source():
    nothing = dict.fromkeys(CLASSES, 0)
    assert rows().count_by_source() == [
        nothing | {"train": 1, "heldout": 1}, nothing | {"train": 1, "leaked": 1}, nothing
    ]  # fmt: skip
    assert rows().are(TRAIN).tolist() == [True, True, False, False]


def test_classes_are_distinct_and_none_is_undecided():
    assert len(set(CLASSES.values())) == len(CLASSES) and UNDECIDED not in CLASSES.values()
