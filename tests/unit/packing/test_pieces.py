"""Which examples are trained on, and which part of each."""

import numpy as np

from adder.core.labels import IGNORE_INDEX
from adder.packing.pieces import Pieces, count_lost, cut, describe_truncation, sample
from adder.tokenization.token_table import TokenTable
from tiny import write_tokens


def test_a_piece_that_carries_no_loss_is_left_out(tmp_path):
    write_tokens(
        tmp_path / "t.arrow", [{"id": "a:1", "input_ids": [7] * 100, "labels": [IGNORE_INDEX] * 70 + [7] * 30}]
    )
    table = TokenTable(tmp_path / "t.arrow")
    lengths, labelled = table.column("tokens"), table.column("labelled")
    for truncate, kept in (("right", []), ("left", [36]), ("split", [64])):
        pieces = cut(table, np.arange(1), lengths, labelled, 64, truncate)
        assert pieces.starts.tolist() == kept, truncate


def test_what_a_length_would_lose_is_counted_as_it_is_cut(tmp_path):
    random = np.random.default_rng(3)
    lengths = random.integers(1, 90, 60).tolist()
    labels = [np.where(random.random(length) < 0.4, 7, IGNORE_INDEX).tolist() for length in lengths]
    rows = [{"id": f"a:{n}", "input_ids": [7] * len(own), "labels": own} for n, own in enumerate(labels)]
    write_tokens(tmp_path / "t.arrow", rows)
    table = TokenTable(tmp_path / "t.arrow")
    tokens, labelled = table.column("tokens").astype(np.int64), table.column("labelled").astype(np.int64)
    limits, some = [1, 2, 16, 30, 31, 89, 90], np.arange(0, 60, 2)
    for truncate in ("drop", "right", "left", "split"):
        pieces = [cut(table, some, tokens[some], labelled[some], limit, truncate) for limit in limits]
        expected = [int(labelled[some].sum() - piece.labelled.sum()) for piece in pieces]
        assert count_lost(table, some, limits, truncate).tolist() == expected, truncate


def test_a_sample_is_of_the_smallest_digests_in_the_order_of_the_rows():
    digests = np.array([5, -3, 9, 0, 7])
    assert sample(digests, None).tolist() == sample(digests, 5).tolist() == [0, 1, 2, 3, 4]
    assert sample(digests, 3).tolist() == [0, 1, 3]


def test_what_is_lost_is_counted_and_said():
    lengths, labelled = np.array([10, 100]), np.array([4, 1])
    kept = Pieces(*(np.array([values]) for values in (0, 0, 10, 4)))
    found = describe_truncation(lengths, labelled, kept, 64, "drop")
    assert found["tokens_lost"] == 100 and found["labelled_lost"] == 1 and found["share"] == 0.2
    assert found["sentence"] == (
        "1 example of 2 are longer and dropped: 1 loss-bearing token (20.00%) is not trained on"
    )
    assert describe_truncation(lengths[:1], labelled[:1], kept, 64, "left")["sentence"] == (
        "no example is longer than 64 tokens"
    )
