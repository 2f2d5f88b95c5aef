"""Near-duplicates and overlap: known pairs are found, unrelated ones never, and the figures mean what they say."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adder.formatting import minhash
from adder.formatting.minhash import (
    HeldoutIndex,
    Signer,
    estimated_similarity,
    exact_similarity,
    near_duplicates,
    prompt_words,
)

ROOT = Path(__file__).resolve().parents[3]
SNIPS = ROOT.parent / "shared" / "data" / "snips"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
needs_shared_data = pytest.mark.skipif(not SNIPS.exists(), reason="../shared/data is not here")
SENTENCE = "the quick brown fox jumps over the lazy dog and runs far away into the dark green forest"
words = st.text("abcdefg", min_size=1, max_size=6)
prompts = st.lists(words, min_size=1, max_size=30).map(" ".join)


def numbered(start: int, count: int) -> str:
    return " ".join(f"w{n}" for n in range(start, start + count))


def slow_overlaps(prompt: str, held: list[str], share: float) -> tuple[int, float] | None:
    """The rule as it reads, without boilerplate: words of the held-out prompt that lie in a common 8-word sequence."""
    mine, best = prompt_words(prompt), None
    for number, text in enumerate(held):
        theirs = prompt_words(text)
        n = min(8, len(theirs))
        if n < 4 or (n < 8 and n <= share * len(mine)):
            continue
        have = {tuple(mine[i : i + n]) for i in range(len(mine) - n + 1)}
        covered = {j for i in range(len(theirs) - n + 1) if tuple(theirs[i : i + n]) in have for j in range(i, i + n)}
        found = len(covered) / len(theirs)
        if found > share and (best is None or found > best[1]):
            best = (number, found)
    return best


# Words


def test_words_have_no_case_and_no_punctuation_in_any_script():
    assert prompt_words("Don't PANIC: it's 42, Straße_7!") == ["don", "t", "panic", "it", "s", "42", "strasse_7"]
    assert prompt_words("東京は hot") == ["東", "京", "は", "hot"]
    assert prompt_words("हिन्दी में, नमस्ते।") == ["हिन्दी", "में", "नमस्ते"]  # vowel signs belong to their word
    assert prompt_words("… — 🙂\n") == prompt_words("") == []


def test_in_ascii_a_word_is_what_regular_expressions_call_one():
    text = "".join(map(chr, range(128))) + " a1_b-c"
    assert prompt_words(text) == re.findall(r"\w+", text.casefold())


@given(st.lists(st.text(max_size=30), max_size=8))
def test_hashes_are_equal_exactly_where_words_are(texts):
    hashes, offsets = minhash.hash_words(texts)
    found = [prompt_words(text) for text in texts]
    assert np.diff(offsets).tolist() == [len(own) for own in found]
    flat = [word for own in found for word in own]
    assert len(set(zip(hashes.tolist(), flat, strict=True))) == len(set(flat)) == len(set(hashes.tolist()))


def test_blocks_change_nothing(monkeypatch):
    texts = [numbered(n, n % 7) for n in range(50)] + ["", "ſtraße"]
    whole = minhash.hash_words(texts)
    monkeypatch.setattr(minhash, "BLOCK", 20)
    for one, other in zip(whole, minhash.hash_words(texts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sequences_do_not_cross_from_one_text_to_the_next():
    hashes, offsets = minhash.hash_words(["a b c d", "e", "", "a b c"])
    sequences, first = minhash.hash_sequences(hashes, offsets, 3)
    assert first.tolist() == [0, 1, 5]
    assert sequences[0] == sequences[2] != sequences[1]
    reordered, _ = minhash.hash_sequences(*minhash.hash_words(["c b a"]), 3)
    assert reordered[0] not in sequences


# Near-duplicates


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


@settings(max_examples=25)
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


# Overlap


def test_a_prompt_that_holds_most_of_a_heldout_one_is_found_with_its_share():
    held = [f"{SENTENCE} in the north", "nothing to do with the other one at all really"]
    index = HeldoutIndex(held, 0.5)
    found = index.overlaps([
        f"Question: {SENTENCE}; in the north! Answer.",
        f"{' '.join(SENTENCE.split()[:12])} somewhere else",
        f"{' '.join(SENTENCE.split()[:9])} somewhere else",
        "a prompt of its own that has nine words here",
    ])  # fmt: skip
    assert found == [(0, 1.0), (0, pytest.approx(12 / 21)), None, None]


def test_just_half_is_not_more_than_half():
    index = HeldoutIndex([numbered(0, 20)], 0.5)
    assert index.overlaps([numbered(0, 10), numbered(0, 11)]) == [None, (0, pytest.approx(0.55))]


def test_seven_words_in_common_are_not_enough():
    index = HeldoutIndex([numbered(0, 8)], 0.1)
    assert index.overlaps([numbered(0, 7), numbered(0, 8)]) == [None, (0, 1.0)]


def test_a_short_heldout_prompt_must_be_there_whole_and_have_four_words():
    held = ["What is the weather", "play music", "a b c d e f g"]
    index = HeldoutIndex(held, 0.5)
    texts = ["so what is the weather now", "what is my weather", "play music", "x a b c d e f g y", "a b c d e f"]
    assert index.overlaps(texts) == [(0, 1.0), None, None, (2, 1.0), None]
    # Four words of eleven: another request.
    assert index.overlaps(["what is the weather in the town where my brother lives"]) == [None]


def test_an_instruction_before_every_question_is_no_overlap():
    held = [f"{SENTENCE} {numbered(100 * n, 10)}" for n in range(50)]
    index = HeldoutIndex(held, 0.5)
    other, leaked = f"{SENTENCE} {numbered(90_000, 10)}", f"something else {numbered(700, 10)}"
    assert slow_overlaps(other, held, 0.5) is not None  # the rule without a word on boilerplate would drop every row
    assert index.overlaps([other, held[7], leaked]) == [None, (7, 1.0), (7, pytest.approx(10 / 17))]


def test_equal_heldout_prompts_are_one_and_no_boilerplate():
    index = HeldoutIndex([numbered(0, 12)] * 40, 0.5)
    assert index.overlaps([numbered(0, 12)]) == [(0, 1.0)]


def test_nothing_held_out_and_no_texts():
    assert HeldoutIndex([], 0.5).overlaps([SENTENCE]) == [None]
    assert HeldoutIndex(["", "?!"], 0.5).overlaps([SENTENCE, ""]) == [None, None]
    assert HeldoutIndex([SENTENCE], 0.5).overlaps([]) == []


@settings(max_examples=200)
@given(
    st.lists(prompts, max_size=2), st.lists(prompts, max_size=4), st.integers(0, 20), st.sampled_from([0.1, 0.5, 0.9])
)
def test_overlaps_are_those_of_the_rule_read_slowly(held, texts, cut, share):
    # Two held-out prompts at most: nothing among so few counts as boilerplate.
    texts = [*texts, *[f"extra {' '.join(text.split()[cut:])}" for text in held], " ".join(held)]
    assert HeldoutIndex(held, share).overlaps(texts) == [slow_overlaps(text, held, share) for text in texts]


@given(st.lists(prompts, min_size=1, max_size=30, unique=True), st.randoms(use_true_random=False))
def test_what_a_training_prompt_overlaps_with_does_not_depend_on_other_rows(texts, random):
    index = HeldoutIndex(texts[::2], 0.3)
    alone = [index.overlaps([text])[0] for text in texts]
    assert index.overlaps(texts) == alone
    shuffled = random.sample(range(len(texts)), len(texts))
    assert index.overlaps([texts[n] for n in shuffled]) == [alone[n] for n in shuffled]


def test_sentences_name_the_limit_and_the_source():
    assert "80 %" in minhash.near_duplicate_method(0.8) and "Broder 1997" in minhash.near_duplicate_method(0.8)
    assert "50 %" in minhash.overlap_method(0.5) and "arXiv:2411.15124" in minhash.overlap_method(0.5)


# Real data


def snips(pattern: str) -> list[str]:
    found = []
    for path in sorted(SNIPS.glob(pattern)):
        data = path.read_bytes()
        text = data.decode("latin-1" if path.name == "train_PlayMusic_full.json" else "utf-8")
        for requests in json.loads(text).values():
            found += ["".join(chunk["text"] for chunk in request["data"]).strip() for request in requests]
    return found


@needs_shared_data
def test_snips_test_requests_in_training_are_found():
    train, test = snips("train_*_full.json"), snips("validate_*.json")
    assert (len(train), len(test)) == (13_784, 700)
    plain = [" ".join(text.casefold().split()) for text in train]
    leaked = {n for n, text in enumerate(test) if " ".join(text.casefold().split()) in set(plain)}
    assert len(leaked) == 11
    found = HeldoutIndex(test, 0.5).overlaps(train)
    for n in leaked:
        rows = [row for row, text in enumerate(plain) if text == " ".join(test[n].casefold().split())]
        if len(prompt_words(test[n])) >= 4:  # shorter ones are the exact check's
            assert all(found[row] and found[row][1] == 1.0 for row in rows)
    assert sum(hit is not None for hit in found) < 0.01 * len(train)


@needs_shared_data
def test_gsm8k_has_hardly_any_overlap_and_the_known_one_is_found():
    train, test = (
        [json.loads(line)["question"] for line in (GSM8K / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "test")
    )
    found = HeldoutIndex(test, 0.5).overlaps(train)
    pairs = [(text, test[hit[0]]) for text, hit in zip(train, found, strict=True) if hit]
    assert len(pairs) <= 5
    assert any(a.startswith("Bella bought stamps") and b.startswith("Max bought stamps") for a, b in pairs)
