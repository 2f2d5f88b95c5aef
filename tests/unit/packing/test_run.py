"""The stage "lengths": packs of every example, and what lengths.json says of them."""

import numpy as np
import pytest

from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from lengths_stage import examples_of, pack, pieces_of


def test_a_model_that_does_not_give_its_context_wants_a_length_set(tmp_path):
    with pytest.raises(UserError, match="names no context length.* set the number of tokens"):
        pack(tmp_path, [20] * 10, context=None)
    made = pack(tmp_path, [20] * 10, context=None, max_seq_length=64, name="set")
    assert made.record["max_seq_length"]["value"] == 64 and made.record["examples"] == 10


def test_packs_hold_every_example_with_its_first_label_masked(tmp_path):
    lengths = np.random.default_rng(1).integers(20, 200, 300)
    made = pack(tmp_path, lengths)
    rows, packs, details = made.rows, made.packs, made.record
    assert sorted(examples_of(rows, packs)) == list(range(300))
    assert details["packing"]["value"] is True
    assert details["packs"] == len(packs) < 300 and details["examples"] == 300 and details["dropped"] == 0
    assert details["fill"] == pytest.approx(lengths.sum() / len(packs) / details["max_seq_length"]["value"], abs=1e-4)
    assert max(found["seq_lengths"].sum() for found in packs) <= details["max_seq_length"]["value"]
    assert sum(details["histogram"]["counts"]) == 300
    assert details["labelled_tokens"] == sum((found["labels"] != IGNORE_INDEX).sum() for found in packs)
    firsts = [found["seq_lengths"][0] for found in packs]
    assert firsts != sorted(firsts, reverse=True)  # not sorted by length, as they were packed


def test_without_packing_a_row_is_an_example_in_the_order_of_the_data(tmp_path):
    made = pack(tmp_path, [30, 10, 20], packing=False)
    rows, packs, details = made.rows, made.packs, made.record
    assert examples_of(rows, packs) == [0, 1, 2]
    assert [found["seq_lengths"].tolist() for found in packs] == [[30], [10], [20]]
    assert details["packing"]["value"] is False and details["examples_per_pack"] == 1


def test_examples_that_are_too_long_are_dropped_whole_and_listed(tmp_path):
    made = pack(tmp_path, [30, 100, 20, 90], max_seq_length=64)
    rows, packs, details = made.rows, made.packs, made.record
    assert details["dropped"] == 2 and details["dropped_ids"] == ["rows:2", "rows:4"]
    truncation = details["truncation"]
    lost = sum(label != IGNORE_INDEX for number in (1, 3) for label in rows[number]["labels"][1:])
    assert (truncation["examples"], truncation["tokens_lost"], truncation["labelled_lost"]) == (2, 190, lost)
    assert "2 examples of 4 are longer and dropped" in truncation["sentence"]
    assert sorted(examples_of(rows, packs)) == [0, 2]
    with pytest.raises(UserError, match="drops every example, the shortest has 90"):
        pack(tmp_path, [100, 90], max_seq_length=64, name="none")


def test_many_examples_without_any_training_stop_the_run(tmp_path):
    lengths = [30] * 17 + [100] * 3
    with pytest.raises(
        UserError, match=r"3 of 20 examples \(15.0%\) are longer than 64 tokens.*lengths.max_dropped allows \(10.0%\)"
    ) as found:
        pack(tmp_path, lengths, max_seq_length=64, max_dropped=0.1, name="a")
    assert "A larger lengths.max_seq_length (the model's context is 512)" in str(found.value)
    with pytest.raises(UserError, match=r"3 of 20 examples.*`lengths.truncate: right`"):
        pack(tmp_path, lengths, context=64, max_dropped=0.1, name="b")
    assert pack(tmp_path, lengths, max_seq_length=64, max_dropped=0.15, name="c").record["dropped"] == 3
    cut = pack(tmp_path, lengths, max_seq_length=64, max_dropped=0.1, truncate="left", name="d").record
    chosen = cut["max_seq_length"]["alternatives"][0]
    assert cut["truncation"]["labelled_lost"] == chosen["labelled_tokens_lost"] > 0 == cut["dropped"]
    assert f"{chosen['labelled_share_lost']:.1%}" in cut["max_seq_length"]["reason"]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    lengths = np.random.default_rng(1).integers(20, 200, 100)
    pack(tmp_path, lengths, name="a")
    pack(tmp_path, lengths, name="b")
    for name in ("packs.parquet", "lengths.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_sample_of_the_examples_is_the_same_every_time_and_moves_little(tmp_path):
    lengths = [20 + number % 7 for number in range(50)]
    made = pack(tmp_path, lengths, name="a", max_examples=20)
    rows, packs, found = made.rows, made.packs, made.record
    assert (found["available"], found["examples"]) == (50, 20)
    first = set(examples_of(rows, packs))
    # One row more displaces one of the sample at most.
    made = pack(tmp_path, [*lengths, 23], name="b", max_examples=20)
    more, packs, _ = made.rows, made.packs, made.record
    second = set(examples_of(more, packs))
    assert len(first) == len(second) == 20 and len(first & second) >= 19


@pytest.mark.parametrize(
    ("truncate", "expected"),
    [
        ("right", [(0, 0, 30), (1, 0, 64), (2, 0, 20)]),
        ("left", [(0, 0, 30), (1, 86, 150), (2, 0, 20)]),
        ("split", [(0, 0, 30), (1, 0, 64), (1, 64, 128), (1, 128, 150), (2, 0, 20)]),
    ],
)
def test_long_examples_are_cut_as_asked_and_the_cost_is_counted(tmp_path, truncate, expected):
    made = pack(tmp_path, [30, 150, 20], max_seq_length=64, truncate=truncate)
    rows, packs, details = made.rows, made.packs, made.record
    assert sorted(pieces_of(rows, packs)) == expected
    trained = sum((found["labels"] != IGNORE_INDEX).sum() for found in packs)
    every = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    truncation = details["truncation"]
    assert truncation["mode"] == truncate and truncation["examples"] == 1 and details["dropped"] == 0
    assert truncation["tokens_lost"] == 200 - sum(end - start for _, start, end in expected)
    assert truncation["labelled_lost"] == every - trained == every - details["labelled_tokens"]
    assert truncation["share"] == pytest.approx(truncation["labelled_lost"] / every)
    # What the choice was weighed by is an estimate, of the same size.
    weighed = details["max_seq_length"]["alternatives"][0]["labelled_tokens_lost"]
    assert abs(weighed - truncation["labelled_lost"]) <= 15
