"""Tokenizers in the terms of GGUF: recognised by what they do, refused where llama.cpp would read other tokens."""

import json

import pytest
from gguf import TokenType
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adder.core.errors import UserError
from adder.export.gguf_vocabulary import Vocabulary, describe
from gguf_tokenizers import TOKENIZERS, byte_level, missing_merge, sentencepiece, split, unigram


def described(tokenizer: PreTrainedTokenizerFast, rows: int) -> Vocabulary:
    return describe(json.loads(tokenizer.backend_tokenizer.to_str()), rows)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_recognised_by_what_they_do(name):
    tokenizer = TOKENIZERS[name]()
    found = described(tokenizer, len(tokenizer) + 5)
    assert found.pre == name.split(",")[0]
    assert len(found.tokens) == len(found.types) == len(tokenizer) + 5  # one a row of the embeddings
    assert found.types[-5:] == [TokenType.UNUSED] * 5 and found.tokens[-1] == f"[PAD{len(tokenizer) + 4}]"
    assert found.types[tokenizer.eos_token_id] == TokenType.CONTROL
    assert (found.model, found.merges is None) == (("llama", True) if name.startswith("default") else ("gpt2", False))


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name.startswith("default")])
def test_pieces_that_are_merged_first_score_highest(name):
    tokenizer = TOKENIZERS[name]()
    found = described(tokenizer, len(tokenizer))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    scores = [found.scores[found.tokens.index(piece)] for piece in made]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(made)
    assert found.space_prefix == (name in ("default", "default, space in front of all"))
    assert bool(found.notes) == ("space in front of" in name)


def test_a_token_without_an_embedding_is_refused():
    tokenizer = TOKENIZERS["gpt-2"]()
    with pytest.raises(
        UserError, match=f"its tokenizer has the token .*, its embeddings have only {len(tokenizer) - 1}"
    ):
        described(tokenizer, len(tokenizer) - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unigram, "is of the type Unigram"),
        (missing_merge, "doesn't merge .* which llama.cpp would"),
        (lambda: byte_level(*split(r"\w+|\W+")), r"splits texts by .*\\w\+.* isn't known here"),
        (
            lambda: byte_level(pre_tokenizers.ByteLevel(False), ignore_merges=True),
            "as gpt-2 but treats merges otherwise",
        ),
        (lambda: byte_level(pre_tokenizers.ByteLevel(True)), "begins with ByteLevel, which can't"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(False), normalizer=normalizers.Lowercase()), "Lowercase"),
        (
            lambda: sentencepiece(pre_tokenizers.Metaspace("▁", "first")),
            "begins with Metaspace, which can't be written",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(make, message):
    with pytest.raises(UserError, match=f"this model can't be written as GGUF: .*{message}"):
        described(make(), 1000)
