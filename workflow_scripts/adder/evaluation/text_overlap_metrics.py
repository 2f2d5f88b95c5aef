"""How near a free text is to its reference: ROUGE-L and chrF, 0 to 1, one reply at a time.

Their means over the rows are the scores of a model: so that two models can be compared row by row. (sacreBLEU's chrF of
a whole corpus counts the n-grams of all rows together instead, which gives long replies more weight.)

The libraries are imported where they are used: the workflow is parsed with the registry of scores.
"""

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

# Words; each character by itself in scripts that are written without spaces (Chinese, Japanese, Thai).
WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")


class WordTokenizer:
    """rouge_score's tokenizer for any language: its own drops all that isn't a to z, so that Russian scores 0."""

    def tokenize(self, text: str) -> list[str]:
        """Words of a text in lower case; for English text they are rouge_score's own."""
        return WORD.findall(text.lower())


@cache
def _rouge() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=WordTokenizer())


@cache
def _chrf() -> "CHRF":
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()  # characters of 1 to 6, no words, recall twice as heavy: chrF2, the usual one


def rouge_l(reference: str, reply: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, "ROUGE"). Equal texts score 1, empty ones too."""
    if reference.strip() == reply.strip():
        return 1.0
    return float(_rouge().score(reference, reply)["rougeL"].fmeasure)


def chrf(reference: str, reply: str) -> float:
    """Character n-gram F2 of one reply (Popovic 2015, "chrF"). Equal texts score 1, empty ones too."""
    if reference.strip() == reply.strip():
        return 1.0
    return _chrf().sentence_score(reply, [reference]).score / 100
