"""Near-duplicates: known pairs are found, unrelated ones never, and the figures mean what they say."""

import os
import signal
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.formatting.similarity import minhash
from adder.formatting.similarity.minhash import (
    Signer,
    estimated_similarity,
    exact_similarity,
    near_duplicate_method,
    near_duplicates,
)
from examples import examples
from format_stage import (
    SENTENCE,
    numbered,
)

words_of_letters = st.text("abcdefg", min_size=1, max_size=6)
prompts = st.lists(words_of_letters, min_size=1, max_size=30).map(" ".join)


@pytest.fixture(scope="module")
def signer():
    return Signer()


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_identical_texts_are_always_found(texts):
    signatures = Signer().sign([*texts, *texts])
    matches = near_duplicates(signatures, 0.8)
    n = len(texts)
    for row in range(n):
        assert matches[n + row] >= 0 and matches[matches[n + row]] == -1
        assert estimated_similarity(signatures[row], signatures[n + row]) == 1.0


def test_unrelated_texts_never_match(signer):
    texts = [numbered(100 * n, 40) for n in range(500)] + ["yes", "no", "Yes, please", "", "?", "!"]
    assert (near_duplicates(signer.sign(texts), 0.5) == -1).all()


def test_case_spacing_and_punctuation_make_no_difference(signer):
    texts = ["Where is my order, please?", "where  is my ORDER please", "Hi", "hi!", "Thanks a", "thanks b"]
    assert near_duplicates(signer.sign(texts), 0.8).tolist() == [-1, 0, -1, 2, -1, -1]


def test_the_earliest_row_stays_and_others_name_a_row_that_stays(signer):
    # Each shares 85 % or more with its neighbours, but the first and the last have nothing to do with each other.
    texts = [numbered(3 * n, 60) for n in range(21)]
    matches = near_duplicates(signer.sign(texts), 0.8)
    assert matches[0] == -1 and (matches >= 0).sum() >= 8
    for row, match in enumerate(matches.tolist()):
        if match >= 0:
            assert match < row and matches[match] == -1
            assert exact_similarity(texts[row], texts[match]) > 0.68  # 3 standard errors below 0.8
    assert (matches == -1).sum() >= 3  # no chain joins the ends


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.95])
def test_the_estimate_is_within_its_standard_error(signer, similarity):
    count = 400
    common = round(2 * count * similarity / (1 + similarity))
    texts = []
    for pair in range(60):
        start = 10_000 * pair
        texts += [numbered(start, count + 2), numbered(start + count - common, count + 2)]
    signatures = signer.sign(texts)
    exact = exact_similarity(texts[0], texts[1])
    assert exact == pytest.approx(similarity, abs=0.01)
    found = np.array([estimated_similarity(signatures[i], signatures[i + 1]) for i in range(0, len(texts), 2)])
    error = np.sqrt(exact * (1 - exact) / minhash.PERMUTATIONS)
    assert abs(found.mean() - exact) < 4 * error / np.sqrt(len(found))
    assert found.std() < 1.5 * error


def test_bytes_that_agree_by_chance_are_not_counted():
    one = np.zeros(minhash.PERMUTATIONS, np.uint8)
    half = np.repeat(np.array([0, 1], np.uint8), minhash.PERMUTATIONS // 2)
    assert estimated_similarity(one, half) == pytest.approx(127 / 255)  # (1/2 - 1/256) / (1 - 1/256)
    assert estimated_similarity(one, one + np.uint8(1)) == 0.0


def test_a_row_is_compared_with_every_kept_row_of_its_bucket():
    bands, rows = minhash.band_shape(0.8)
    first = np.zeros((bands, rows), np.uint8)
    second = first.copy()
    second[bands // 2 :] = 1  # shares half of its buckets with the first, and is half like it
    third = second.copy()
    third[bands // 2 :, 0] = 2  # shares those buckets only, and is much like the second
    signatures = np.stack([one.reshape(-1) for one in (first, second, third)])
    assert near_duplicates(signatures, 0.8).tolist() == [-1, -1, 1]


def test_most_pairs_at_the_limit_and_nearly_all_above_it_are_found(signer):
    def found(common):
        texts = [numbered(1000 * p + shift, 202) for p in range(300) for shift in (0, 200 - common)]
        return (near_duplicates(signer.sign(texts), 0.7)[1::2] >= 0).mean()

    assert found(183) > 0.99  # similarity 0.84
    assert found(100) < 0.01  # similarity 0.33


@pytest.mark.parametrize("similarity", [0.01, 0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_leave_the_recall_that_is_promised(similarity):
    bands, rows = minhash.band_shape(similarity)
    assert bands * rows <= minhash.PERMUTATIONS
    if rows > 1:
        assert 1 - (1 - similarity**rows) ** bands >= minhash.RECALL


@examples(25)
@given(st.permutations(range(24)))
def test_the_order_of_rows_does_not_matter_to_what_belongs_together(order):
    # Eight groups of three near-copies: whichever comes first is kept, the other two go.
    texts = [f"{numbered(1000 * (n // 3), 80)} copy {n}" for n in range(24)]
    matches = near_duplicates(Signer().sign([texts[n] for n in order]), 0.8)
    groups = [n // 3 for n in order]
    assert (matches == -1).sum() == 8
    for row, match in enumerate(matches.tolist()):
        if match >= 0:
            assert groups[row] == groups[match]
        else:
            assert groups[row] not in groups[:row]


def test_a_thousand_rows_of_one_boilerplate_stay_apart_and_quick(signer):
    texts = [f"{SENTENCE} {numbered(100 * n, 12)}" for n in range(1000)]  # about 0.4 in common
    assert (near_duplicates(signer.sign(texts), 0.8) == -1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_signing_in_a_forked_worker_does_not_wait_for_threads_of_its_parent(signer):
    texts = [numbered(n, 20) for n in range(3000)]
    expected = signer.sign(texts)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        os._exit(int(not np.array_equal(Signer().sign(texts), expected)))
    assert os.waitpid(child, 0)[1] == 0


def test_no_rows_and_one_row(signer):
    assert signer.sign([]).shape == (0, minhash.PERMUTATIONS)
    assert near_duplicates(signer.sign([]), 0.8).tolist() == []
    assert near_duplicates(signer.sign(["one"]), 0.8).tolist() == [-1]


def test_the_sentence_names_the_limit_and_the_source():
    assert "80 %" in near_duplicate_method(0.8) and "Broder 1997" in near_duplicate_method(0.8)
