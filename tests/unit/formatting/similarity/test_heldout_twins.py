"""Training rows that are a held-out row with a few words changed are found, and rows that only look like it aren't."""

import numpy as np
import pytest

from adder.formatting.replies import joined, reply_key
from adder.formatting.similarity.heldout_twins import (
    agreement,
    are_twins,
    same_reply_pairs,
    shared_share,
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
    assert {held for _, held in same_reply_pairs(train, held, 9)} == {0, 1}
    assert same_reply_pairs(train, held[:0]) == [] and same_reply_pairs(train[:0], held) == []


def test_rows_with_nearly_the_same_words_are_found_by_their_signatures():
    words = [f"w{n}" for n in range(60)]
    texts = [" ".join(words), " ".join([*words[:30], "other", *words[31:]]), " ".join(reversed(words))]
    signatures = Signer().sign(texts)
    held, train = np.array([0]), np.array([1, 2])
    assert similar_pairs(signatures, train, held, 0.8) == [(1, 0)]
    assert similar_pairs(signatures, train[1:], held, 0.8) == []


ASKED = "My lamp left Oslo three days ago and has not come"


@pytest.mark.parametrize(
    "train",
    [
        "My lamp left Oslo three",  # cut
        "days ago and has not come",
        f"{ASKED}. Please answer soon, for I can't wait any longer for it.",
        "not come has and ago days three Oslo left lamp My",
    ],
)
def test_a_prompt_cut_extended_or_turned_round_is_a_twin_where_the_reply_tells_its_row(train):
    reply = "Ticket 7 is open."
    assert are_twins((train, reply), (ASKED, reply), own(ASKED), "rare reply")
    assert are_twins((train, reply), (ASKED, reply), own(ASKED)) is None  # a reply that many rows have
    assert are_twins(("Where is the tent I paid for?", reply), (ASKED, reply), own(ASKED), "rare reply") is None


def test_a_long_reply_tells_its_row_though_a_few_words_differ():
    reply = "It left our house on Monday and is now on a ship that sails north to Bergen."
    other = reply.replace("house", "store").replace("north", "west")
    half = " ".join(ASKED.split()[:5])
    assert are_twins((half, reply), (ASKED, reply), own(ASKED), "common reply")
    assert are_twins((ASKED, "It left."), (ASKED, "It left."), own(ASKED), "common reply") is None  # a label
    assert are_twins((half, other), (ASKED, reply), own(ASKED), "partly")
    assert are_twins((ASKED, "It left."), (ASKED, ""), own(ASKED), "partly") is None
    assert are_twins((half, "We are sorry to hear that; a new one is on its way."), (ASKED, reply), own(ASKED)) is None


def test_a_passage_that_many_rows_share_makes_no_twins_of_their_questions():
    passage = " ".join(f"word{n}" for n in range(60))
    held = f"{passage} When was the bridge built?"
    mask = own(held)
    mask[:60] = False
    assert shared_share(f"{passage} Who paid for all of these ships?", held, mask) < 0.5
    assert shared_share(f"{passage} The bridge, when was it built?", held, mask) == 1.0
    assert shared_share("bridge", held, mask) == shared_share("", held, mask) == 0.0


def test_prompts_of_a_template_go_by_what_is_their_own():
    held = "What is the weather in Oslo"
    mask = own(held)
    mask[:5] = False
    assert shared_share("What is the weather in Rome", held, mask) == 0.0
    assert shared_share("What is the weather in Oslo tomorrow", held, mask) == 1.0
