"""Overlap of training prompts with held-out ones, by the rule as it reads."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adder.formatting.similarity.heldout_overlap import HeldoutIndex, overlap_method
from adder.formatting.similarity.words import prompt_words
from examples import examples
from format_stage import (
    SENTENCE,
    numbered,
)

ROOT = Path(__file__).resolve().parents[3]
SNIPS = ROOT.parent / "shared" / "data" / "snips"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
needs_shared_data = pytest.mark.skipif(not SNIPS.exists(), reason="../shared/data is not here")
words_of_letters = st.text("abcdefg", min_size=1, max_size=6)
prompts = st.lists(words_of_letters, min_size=1, max_size=30).map(" ".join)


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


@examples(200)
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


def test_the_sentence_names_the_limit_and_the_source():
    assert "50 %" in overlap_method(0.5) and "arXiv:2411.15124" in overlap_method(0.5)
