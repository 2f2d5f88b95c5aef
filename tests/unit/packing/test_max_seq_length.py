"""The choice of max_seq_length: candidates, what each would cost, and the sentence that says why."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.core.errors import UserError
from adder.packing.max_seq_length import choose_max_seq_length, ladder
from adder.packing.pack_or_pad import choose_packing
from adder.packing.stage import LengthsSettings
from examples import examples

ARTICLE = np.array([180, 95, 310, 150, 220, 60, 400, 130, 275, 200])


def choose(lengths, context=8192, **choices):
    lengths = np.asarray(lengths)
    own = LengthsSettings(**{"effective_batch_size": 16, "max_examples": None, **choices})
    return choose_max_seq_length(lengths, lengths // 4, context, own)


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
        choice = choose(lengths, effective_batch_size=effective_batch)
        assert row(choice, choice.value)["examples_per_pack"] <= effective_batch


def test_examples_longer_than_the_models_context():
    choice = choose([100, 600, 900], context=512)
    assert choice.value == 512
    assert "model's context of 512" in choice.reason and "2 of 3 are longer and dropped" in choice.reason


def test_a_length_asked_for_is_taken_or_refused_with_both_numbers():
    choice = choose(ARTICLE, max_seq_length=256)
    assert choice.value == 256 and "as set in the configuration" in choice.reason
    assert row(choice, 256)["examples_truncated"] == 3
    with pytest.raises(UserError, match=r"lengths\.max_seq_length: 4096 .* context is 2048"):
        choose(ARTICLE, context=2048, max_seq_length=4096)


@examples(60)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(100, 2000), st.integers(1, 32))
def test_any_lengths_give_a_length_within_the_context_and_a_reason(lengths, context, effective_batch):
    choice = choose(lengths, context=context, effective_batch_size=effective_batch)
    assert 0 < choice.value <= context and str(choice.value) in choice.reason
    json.dumps(choice.to_dict(), allow_nan=False)
    kept = np.array([length for length in lengths if length <= choice.value])
    if max(lengths) <= context // 64 * 64:
        assert len(kept) >= 0.99 * len(lengths)
    if len(kept):
        json.dumps(choose_packing(kept, choice.value, effective_batch).to_dict(), allow_nan=False)
