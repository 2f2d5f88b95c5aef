"""Words and sequences of them, hashed."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.formatting.similarity import words
from adder.formatting.similarity.words import folded, prompt_words
from format_stage import (
    numbered,
)


def test_words_have_no_case_and_no_punctuation_in_any_script():
    assert prompt_words("Don't PANIC: it's 42, Straße_7!") == ["don", "t", "panic", "it", "s", "42", "strasse_7"]
    assert prompt_words("東京は hot") == ["東", "京", "は", "hot"]
    assert prompt_words("हिन्दी में, नमस्ते।") == ["हिन्दी", "में", "नमस्ते"]  # vowel signs belong to their word
    assert prompt_words("… — 🙂\n") == prompt_words("") == []


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("\uff37\uff48\uff41\uff54\u3000\uff12\uff0b\uff12\uff1f", "what 2+2?"),
        ("Cafe\u0301 Gru\u0308\u00dfe", "caf\u00e9 gr\u00fcsse"),
        ("co\u00adop\u200berate\ufeff", "cooperate"),
        ("ｶﾞｲﾄﾞ", "ガイド"),
    ],
)
def test_one_text_in_several_ways_of_writing_is_one(text, same):
    assert folded(text) == same and prompt_words(text) == prompt_words(same)


def test_what_means_something_else_stays_another():
    assert len({folded(text) for text in ("5²", "52", "5₂", "⑤2")}) == 4


def test_in_ascii_a_word_is_what_regular_expressions_call_one():
    text = "".join(map(chr, range(128))) + " a1_b-c"
    assert prompt_words(text) == re.findall(r"\w+", text.casefold())


@given(st.lists(st.text(max_size=30), max_size=8))
def test_hashes_are_equal_exactly_where_words_are(texts):
    hashes, offsets = words.hash_words(texts)
    found = [prompt_words(text) for text in texts]
    assert np.diff(offsets).tolist() == [len(own) for own in found]
    flat = [word for own in found for word in own]
    assert len(set(zip(hashes.tolist(), flat, strict=True))) == len(set(flat)) == len(set(hashes.tolist()))


def test_blocks_change_nothing(monkeypatch):
    texts = [numbered(n, n % 7) for n in range(50)] + ["", "ſtraße"]
    whole = words.hash_words(texts)
    monkeypatch.setattr(words, "BLOCK", 20)
    for one, other in zip(whole, words.hash_words(texts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sequences_do_not_cross_from_one_text_to_the_next():
    hashes, offsets = words.hash_words(["a b c d", "e", "", "a b c"])
    sequences, first = words.hash_sequences(hashes, offsets, 3)
    assert first.tolist() == [0, 1, 5]
    assert sequences[0] == sequences[2] != sequences[1]
    reordered, _ = words.hash_sequences(*words.hash_words(["c b a"]), 3)
    assert reordered[0] not in sequences
