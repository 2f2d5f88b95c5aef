"""Tokenizers of the kinds that GGUF files know, trained on a few sentences, and two that no GGUF file can hold."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adder.export.gguf_vocabulary import LLAMA3_SPLIT, TEKKEN_SPLIT
from tiny import CHATML, CORPUS

TEXTS = [
    "My order 48213 has not arrived, where is the parcel?",
    "  Two  spaces,\ttabs\n\n\nand 1234567 DON'T we'll I'M naïve ÉCOLE x_y/z\r\n ",
    "<|im_start|>user\nrefund of 19.99<|im_end|>\n<|im_start|>assistant\n",
    "日本語 и русский, 🚀 emoji; HTTPServer2x  ",
]


def byte_level(*steps, ignore_merges: bool = False, normalizer=None, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((CORPUS + TEXTS) * 4, trainer)
    tokenizer.add_tokens(["<think>"])
    return finished(tokenizer, bos)


def split(regex: str):
    return pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)


def sentencepiece(*steps, normalizer=None) -> PreTrainedTokenizerFast:
    """Like Llama 2's: byte fall-back, and for each piece all the merges that make it, in the pieces' order."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((CORPUS + TEXTS[:1]) * 4, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    ranked = dict.fromkeys(left + right for left, right in state["model"]["merges"])
    cuts = [(piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece))]
    state["model"]["merges"] = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    controls = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in controls]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer, tokenizer.normalizer = (steps[0] if steps else None), normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finished(tokenizer, True, bos_token="<s>", unk_token="<unk>")


def finished(tokenizer: Tokenizer, bos: bool, bos_token: str = "<|endoftext|>", **names) -> PreTrainedTokenizerFast:
    if bos:
        ids = [(bos_token, tokenizer.token_to_id(bos_token))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos_token} $A", special_tokens=ids)
    end = "<|im_end|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=end, pad_token=end, **names
    )
    fast.chat_template = CHATML
    return fast


prepended = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)),
    "llama-bpe": lambda: byte_level(*split(LLAMA3_SPLIT), ignore_merges=True, bos=True),
    "qwen2": lambda: byte_level(*split(LLAMA3_SPLIT.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "dbrx": lambda: byte_level(*split(LLAMA3_SPLIT)),
    "tekken": lambda: byte_level(*split(TEKKEN_SPLIT), bos=True),
    "default": lambda: sentencepiece(normalizer=prepended),
    "default, as Gemma": lambda: sentencepiece(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizer=normalizers.Replace(" ", "▁")
    ),
    "default, no space in front": lambda: sentencepiece(normalizer=normalizers.Replace(" ", "▁")),
    "default, space in front of all": lambda: sentencepiece(pre_tokenizers.Metaspace("▁", "always", split=False)),
    "default, space in front of the first": lambda: sentencepiece(pre_tokenizers.Metaspace("▁", "first", split=False)),
}


def unigram():
    tokenizer = Tokenizer(models.Unigram([("<|im_start|>", 0.0), ("<|im_end|>", 0.0), ("a", -1.0)], 0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")


def missing_merge():
    """Of a piece that two merges make, only one is there."""
    state = json.loads(sentencepiece(normalizer=prepended).backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    del merges[next(number for number, piece in enumerate(made) if piece in made[:number])]
    return finished(Tokenizer.from_str(json.dumps(state)), True, bos_token="<s>", unk_token="<unk>")
