"""ROUGE-L and chrF of single replies, against figures worked out by hand and the libraries' own."""

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from adder.evaluation.text_overlap_metrics import chrf, rouge_l

REFERENCE = "The cat sat on the mat; it didn't move."
REPLY = "A cat_sat on that mat, and it DIDN'T move."


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "the cat ... on ... mat": 4 of 6 words on either side
    assert rouge_l("The cat sat on the mat.", "the cat lay on a mat") == pytest.approx(4 / 6)
    # recall 2 of 4, precision 2 of 2
    assert rouge_l("one two three four", "two four") == pytest.approx(2 * 0.5 / 1.5)


def test_english_scores_are_the_libraries_own():
    # rouge_score's default tokenizer, no stemmer: the same words, so the very same number
    assert rouge_l(REFERENCE, REPLY) == RougeScorer(["rougeL"]).score(REFERENCE, REPLY)["rougeL"].fmeasure
    assert chrf(REFERENCE, REPLY) == pytest.approx(sentence_chrf(REPLY, [REFERENCE]).score / 100)


@pytest.mark.parametrize(
    ("reference", "reply", "score"),
    [
        ("Привет, мир", "привет мой мир", 0.8),
        ("我爱北京", "我爱上海", 0.5),
        ("สวัสดี", "สวัสดี ครับ", 0.75),
        ("Größe", "größe!", 1.0),
    ],
)
def test_other_scripts_count_as_words_too(reference, reply, score):
    assert rouge_l(reference, reply) == pytest.approx(score)


@pytest.mark.parametrize("metric", [rouge_l, chrf])
@pytest.mark.parametrize(
    ("reference", "reply", "score"), [("", "", 1), ("?!", " ?!\n", 1), ("a", "", 0), ("", "a", 0), ("abc", "xyz", 0)]
)
def test_bounds(metric, reference, reply, score):
    assert metric(reference, reply) == score
