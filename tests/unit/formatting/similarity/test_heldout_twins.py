"""Training rows that are a held-out row with a few words changed are found, and rows that only look like it aren't."""

import numpy as np
import pytest

from adder.formatting.replies import joined, reply_key
from adder.formatting.similarity.heldout_twins import (
    agreement,
    are_twins,
    same_reply_pairs,
    similar_pairs,
)
from adder.formatting.similarity.minhash import Signer
from adder.formatting.similarity.words import hash_words


def own(text):
    return np.ones(len(hash_words([text])[0]), bool)


@pytest.mark.parametrize(
    ("train", "held", "twins"),
    [
        ("Where is my parcel now", "Where is my package now", True),
        ("Book a table for two at noon", "Book a table for two at six", True),
        ("Where is my parcel now", "How do I change my password", False),
        ("Summarise: " + "one two three " * 9, "Where is my parcel now", False),
    ],
)
def test_prompts_with_one_word_changed_and_one_reply_are_twins(train, held, twins):
    reply = "It left Oslo on Monday."
    assert (are_twins((train, reply), (held, reply), own(held)) is not None) is twins
    assert are_twins((train, "Something else altogether, sir"), (held, reply), own(held)) is None


def test_only_a_prompts_own_words_count():
    passage = " ".join(f"word{n}" for n in range(80))
    held, train = f"{passage} When was the bridge built?", f"{passage} Who paid for all these ships?"
    assert agreement(train, held) > 0.9
    mask = own(held)
    mask[:80] = False  # a passage that many rows share
    assert agreement(train, held, mask) < 0.3 and are_twins((train, "In 1905"), (held, "In 1905"), mask) is None
    assert agreement(held.replace("built", "made"), held, mask) == pytest.approx(0.8)


def test_a_reply_that_many_rows_have_tells_no_row():
    def keys(texts):
        return joined([reply_key({"messages": [{"role": "assistant", "content": text}]}) for text in texts])

    held = keys(["yes", "It left Oslo on Monday.", "no", ""])
    train = keys(["yes"] * 9 + ["it left  oslo on monday.", ""])
    assert same_reply_pairs(train, held) == [(9, 1)]
    assert same_reply_pairs(train, held[:0]) == [] and same_reply_pairs(train[:0], held) == []


def test_rows_with_nearly_the_same_words_are_found_by_their_signatures():
    words = [f"w{n}" for n in range(60)]
    texts = [" ".join(words), " ".join([*words[:30], "other", *words[31:]]), " ".join(reversed(words))]
    signatures = Signer().sign(texts)
    held, train = np.array([0]), np.array([1, 2])
    assert similar_pairs(signatures, train, held, 0.8) == [(1, 0)]
    assert similar_pairs(signatures, train[1:], held, 0.8) == []
