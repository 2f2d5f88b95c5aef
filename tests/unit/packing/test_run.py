import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.model_config import attention_share, context_length
from adder.core.progress import Progress
from adder.evaluation.max_new_tokens import choose_max_new_tokens
from adder.packing.run import (
    choose_max_seq_length,
    choose_packing,
    ladder,
    run,
)
from adder.training.packed_dataset import PackedExamples
from tiny import write_tokens

ARTICLE = np.array([180, 95, 310, 150, 220, 60, 400, 130, 275, 200])


def choose(lengths, context=8192, keep_whole=0.99, effective_batch=16, requested="auto", **more):
    lengths = np.asarray(lengths)
    return choose_max_seq_length(lengths, lengths // 4, context, keep_whole, effective_batch, requested, **more)


def row(choice, max_seq_length):
    return next(row for row in choice.alternatives if row["max_seq_length"] == max_seq_length)


def test_the_ladder_climbs_in_multiples_of_64_up_to_the_context():
    assert ladder(2048) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert ladder(500) == [64, 128, 192, 256, 384, 448]
    assert ladder(40) == [40]
    assert all(step % 64 == 0 for step in ladder(40960)) and ladder(40960)[-1] == 40960


def test_the_articles_lengths_are_packed_into_one_sequence_of_2048():
    choice = choose(ARTICLE)
    assert choice.value == 2048
    found = row(choice, 2048)
    assert found["packs"] == 1 and round(100 * found["packing_waste"], 1) == 1.4
    assert "1.4%" in choice.reason and "10.0 examples" in choice.reason
    packing = choose_packing(ARTICLE, 2048, 16)
    assert packing.value is True
    waste = {item["layout"]: round(100 * item["waste"], 1) for item in packing.alternatives}
    assert waste["padded to max_seq_length"] == 90.1 and waste["packed"] == 1.4
    assert "90.1%" in packing.reason and "10 examples fit into 1 sequence of 2048" in packing.reason


def test_without_packing_the_smallest_length_that_keeps_enough_is_chosen():
    choice = choose(ARTICLE, packing=False)
    assert choice.value == 512
    assert "384 tokens would drop 1" in choice.reason


def test_a_few_very_long_examples_are_dropped_and_counted():
    lengths = [100] * 990 + [5000] * 10
    choice = choose(lengths, packing=False)
    assert choice.value == 128
    found = row(choice, 128)
    assert found["examples_truncated"] == 10 and found["share_whole"] == 0.99
    assert found["labelled_tokens_lost"] == 10 * 1250
    assert found["labelled_share_lost"] == pytest.approx(12500 / (990 * 25 + 12500))
    assert "10 of 1,000 are longer and dropped, with 33.6%" in choice.reason
    assert choose(lengths, keep_whole=0.995, packing=False).value == 6144


def test_everything_is_kept_where_that_takes_at_most_twice_the_length():
    assert choose([100] * 995 + [250] * 5, packing=False).value == 256
    assert choose([100] * 995 + [300] * 5, packing=False).value == 128


def test_a_pack_holds_no_more_examples_than_one_step_should_see():
    lengths = np.random.default_rng(0).integers(80, 140, 2000)
    for effective_batch in (4, 8, 32):
        choice = choose(lengths, effective_batch=effective_batch)
        assert row(choice, choice.value)["examples_per_pack"] <= effective_batch


def test_examples_longer_than_the_models_context():
    choice = choose([100, 600, 900], context=512)
    assert choice.value == 512
    assert "model's context of 512" in choice.reason and "2 of 3 are longer and dropped" in choice.reason


def test_a_length_asked_for_is_taken_or_refused_with_both_numbers():
    choice = choose(ARTICLE, requested=256)
    assert choice.value == 256 and "as set in the configuration" in choice.reason
    assert row(choice, 256)["examples_truncated"] == 3
    with pytest.raises(UserError, match=r"lengths\.max_seq_length: 4096 .* context is 2048"):
        choose(ARTICLE, context=2048, requested=4096)


def test_packing_is_off_where_it_gains_nothing():
    assert choose_packing(np.full(100, 700), 768, 16).value is False  # no two fit
    assert choose_packing(np.array([20, 20, 20]), 2048, 16).value is False  # one pack, nearly all of it empty
    assert choose_packing(np.array([30]), 64, 16).value is False
    assert choose_packing(np.full(1000, 70), 128, 16, requested=True).value is True
    assert choose_packing(ARTICLE, 2048, 16, requested=False).value is False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(100, 2000), st.integers(1, 32))
def test_any_lengths_give_a_length_within_the_context_and_a_reason(lengths, context, effective_batch):
    choice = choose(lengths, context=context, effective_batch=effective_batch)
    assert 0 < choice.value <= context and str(choice.value) in choice.reason
    json.dumps(choice.to_dict(), allow_nan=False)
    kept = np.array([length for length in lengths if length <= choice.value])
    if max(lengths) <= context // 64 * 64:
        assert len(kept) >= 0.99 * len(lengths)
    if len(kept):
        json.dumps(choose_packing(kept, choice.value, effective_batch).to_dict(), allow_nan=False)


def test_max_new_tokens_holds_the_longest_reply_and_some_more():
    choice = choose_max_new_tokens({"max": 50}, 8192)
    assert choice.value == 64 and "50" in choice.reason
    assert choose_max_new_tokens({"max": 64}, 8192).value == 72
    assert choose_max_new_tokens({"max": 1}, 8192).value == 8
    assert choose_max_new_tokens({"max": 600}, 512).value == 512


def test_context_length_is_found_under_its_various_names(tmp_path):
    for config, expected in (
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 32768}}, 32768),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert context_length(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    assert context_length(tmp_path) is None


def test_a_model_that_does_not_give_its_context_is_refused(stage):
    with pytest.raises(UserError, match="config.json' doesn't give|config.json doesn't give"):
        stage([20] * 10, context=None)


@pytest.fixture
def stage(tmp_path):
    """Run the stage on examples made of (tokens, labels); each example's tokens carry its own number."""

    def run_stage(lengths, context=512, name="out", **settings):
        generator = np.random.default_rng(0)
        ids = [[1000 * number + position for position in range(length)] for number, length in enumerate(lengths)]
        labels = [[token if generator.random() < 0.5 else -100 for token in example] for example in ids]
        rows = [
            # A digest that is the row's own, in no order.
            {"id": f"rows:{n + 1}", "input_ids": ids[n], "labels": labels[n], "digest": (n * 2654435761) % 2**32}
            for n in range(len(ids))
        ]
        (tmp_path / "tokenize").mkdir(exist_ok=True)
        (tmp_path / "model" / "model").mkdir(parents=True, exist_ok=True)
        tokens = tmp_path / "tokenize" / "train.arrow"
        write_tokens(tokens, rows)
        (tmp_path / "model" / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
        out = tmp_path / name
        out.mkdir()
        defaults = {"max_seq_length": "auto", "packing": "auto", "keep_whole": 0.99, "effective_batch": 16}
        defaults |= {"max_examples": None, "truncate": "drop"}
        inputs = {"tokenize": tmp_path / "tokenize", "model": tmp_path / "model"}
        run({**defaults, **settings}, inputs, out, Progress.silent())
        packs = PackedExamples(tokens, out / "packs.parquet", seed=0, reshuffle=False)
        return rows, [packs.pack(number) for number in range(len(packs.seq_lengths))], read_json(out / "lengths.json")

    return run_stage


def pieces_of(rows, packs):
    """(example, first token, last token) of every piece in order; ids and labels must be the example's own there."""
    seen = []
    for pack in packs:
        position = 0
        assert len(pack["input_ids"]) == len(pack["labels"]) == pack["seq_lengths"].sum()
        for length in pack["seq_lengths"]:
            number, start = divmod(int(pack["input_ids"][position]), 1000)
            here, there = slice(position, position + length), slice(start, start + length)
            assert pack["input_ids"][here].tolist() == rows[number]["input_ids"][there]
            assert pack["labels"][here].tolist() == [-100, *rows[number]["labels"][there][1:]]
            seen.append((number, start, start + int(length)))
            position += length
    return seen


def check_packs(rows, packs):
    """Every pack is whole examples, joined; return their numbers in order."""
    found = pieces_of(rows, packs)
    assert all((start, end) == (0, len(rows[number]["input_ids"])) for number, start, end in found)
    return [number for number, _, _ in found]


def test_packs_hold_every_example_with_its_first_label_masked(stage):
    lengths = np.random.default_rng(1).integers(20, 200, 300)
    table, packs, details = stage(lengths)
    assert sorted(check_packs(table, packs)) == list(range(300))
    assert details["packing"]["value"] is True
    assert details["packs"] == len(packs) < 300 and details["examples"] == 300 and details["dropped"] == 0
    assert details["fill"] == pytest.approx(lengths.sum() / len(packs) / details["max_seq_length"]["value"], abs=1e-4)
    assert max(pack["seq_lengths"].sum() for pack in packs) <= details["max_seq_length"]["value"]
    assert sum(details["histogram"]["counts"]) == 300
    assert details["labelled_tokens"] == sum((pack["labels"] != -100).sum() for pack in packs)
    firsts = [pack["seq_lengths"][0] for pack in packs]
    assert firsts != sorted(firsts, reverse=True)  # not sorted by length, as they were packed


def test_without_packing_a_row_is_an_example_in_the_order_of_the_data(stage):
    table, packs, details = stage([30, 10, 20], packing=False)
    assert check_packs(table, packs) == [0, 1, 2]
    assert [pack["seq_lengths"].tolist() for pack in packs] == [[30], [10], [20]]
    assert details["packing"]["value"] is False and details["examples_per_pack"] == 1


def test_examples_that_are_too_long_are_dropped_whole_and_listed(stage):
    table, packs, details = stage([30, 100, 20, 90], max_seq_length=64)
    assert details["dropped"] == 2 and details["dropped_ids"] == ["rows:2", "rows:4"]
    truncation = details["truncation"]
    lost = sum(label != -100 for number in (1, 3) for label in table[number]["labels"][1:])
    assert (truncation["examples"], truncation["tokens_lost"], truncation["labelled_lost"]) == (2, 190, lost)
    assert "2 examples of 4 are longer and dropped" in truncation["sentence"]
    assert sorted(check_packs(table, packs)) == [0, 2]
    with pytest.raises(UserError, match="drops every example, the shortest has 90"):
        stage([100, 90], max_seq_length=64, name="none")


def test_the_same_input_gives_the_same_bytes(stage, tmp_path):
    lengths = np.random.default_rng(1).integers(20, 200, 100)
    stage(lengths, name="a")
    stage(lengths, name="b")
    for name in ("packs.parquet", "lengths.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_sample_of_the_examples_is_the_same_every_time_and_moves_little(stage):
    lengths = [20 + number % 7 for number in range(50)]
    table, packs, found = stage(lengths, name="a", max_examples=20)
    assert (found["available"], found["examples"]) == (50, 20)
    first = set(check_packs(table, packs))
    # One row more displaces one of the sample at most.
    more, packs, _ = stage([*lengths, 23], name="b", max_examples=20)
    second = set(check_packs(more, packs))
    assert len(first) == len(second) == 20 and len(first & second) >= 19


@pytest.mark.parametrize(
    ("truncate", "expected"),
    [
        ("right", [(0, 0, 30), (1, 0, 64), (2, 0, 20)]),
        ("left", [(0, 0, 30), (1, 86, 150), (2, 0, 20)]),
        ("split", [(0, 0, 30), (1, 0, 64), (1, 64, 128), (1, 128, 150), (2, 0, 20)]),
    ],
)
def test_long_examples_are_cut_as_asked_and_the_cost_is_counted(stage, truncate, expected):
    rows, packs, details = stage([30, 150, 20], max_seq_length=64, truncate=truncate)
    assert sorted(pieces_of(rows, packs)) == expected
    trained = sum((pack["labels"] != -100).sum() for pack in packs)
    every = sum(label != -100 for row in rows for label in row["labels"][1:])
    truncation = details["truncation"]
    assert truncation["mode"] == truncate and truncation["examples"] == 1 and details["dropped"] == 0
    assert truncation["tokens_lost"] == 200 - sum(end - start for _, start, end in expected)
    assert truncation["labelled_lost"] == every - trained == every - details["labelled_tokens"]
    assert truncation["share"] == pytest.approx(truncation["labelled_lost"] / every)
    # What the choice was weighed by is an estimate, of the same size.
    weighed = details["max_seq_length"]["alternatives"][0]["labelled_tokens_lost"]
    assert abs(weighed - truncation["labelled_lost"]) <= 15


def test_a_piece_that_carries_no_loss_is_left_out(tmp_path):
    from adder.packing.run import cut
    from adder.tokenization.token_table import TokenTable

    write_tokens(tmp_path / "t.arrow", [{"id": "a:1", "input_ids": [7] * 100, "labels": [-100] * 70 + [7] * 30}])
    table = TokenTable(tmp_path / "t.arrow")
    lengths, labelled = table.column("tokens"), table.column("labelled")
    for truncate, kept in (("right", []), ("left", [36]), ("split", [64])):
        pieces = cut(table, np.arange(1), lengths, labelled, 64, truncate)
        assert pieces.starts.tolist() == kept, truncate


def test_attention_costs_more_the_longer_the_examples_are():
    # Llama-3.1-8B's shape: 218.1 M weights a layer, 4,096 wide.
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    assert attention_share(shape, np.array([1000])) == pytest.approx(4.096e6 / (4.096e6 + 218.1e6), rel=1e-3)
    many = attention_share(shape, np.array([1000] * 50))
    assert many == pytest.approx(attention_share(shape, np.array([1000])))  # no example sees another
    assert attention_share(shape, np.array([100_000])) > 0.6
    assert attention_share({}, np.array([10])) is None and attention_share(shape, np.array([], dtype=int)) is None


def test_refilled_packs_keep_their_shape_and_every_example(stage, tmp_path):
    lengths = np.random.default_rng(1).integers(20, 60, 300)
    rows, first, _ = stage(lengths)
    packs = PackedExamples(tmp_path / "tokenize" / "train.arrow", tmp_path / "out" / "packs.parquet", 0, True)
    seen = {}
    for epoch in (0, 1, 2, 1):
        packs.start_epoch(epoch)
        made = [packs.pack(number) for number in range(len(packs.seq_lengths))]
        assert [pack["seq_lengths"].tolist() for pack in made] == [pack["seq_lengths"].tolist() for pack in first]
        found = check_packs(rows, made)
        assert sorted(found) == list(range(300))
        assert seen.setdefault(epoch, found) == found  # an epoch that is started again is the same
    assert seen[0] == check_packs(rows, first) and seen[0] != seen[1] != seen[2]
