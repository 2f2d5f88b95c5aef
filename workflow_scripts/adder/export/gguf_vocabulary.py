"""A model's tokenizer in the terms of GGUF: pieces, their kinds, merges or scores, the name of the pre-tokenizer.

GGUF knows two kinds that matter here: "gpt2", byte-level BPE with merges and one of the pre-tokenizers that llama.cpp
has compiled in, and "llama", SentencePiece's BPE with byte fall-back, where a score per piece says what merges first.
A tokenizer that neither describes is refused, for a model that reads other tokens than it was trained on is worse than
none; where a few texts are read otherwise, a note says which. All of it was compared with llama.cpp itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from adder.export.gguf_architectures import refused

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of the pre-tokenizers, by the regular expression (or kind) that splits the text before the merges.
# Those of IGNORES_MERGES take a word that is a piece as it is, whether merges lead there or not; AS_MERGED is what
# splits as they do and merges.
SPLITS = {
    LLAMA3_SPLIT: "llama-bpe",
    LLAMA3_SPLIT.replace("{1,3}", ""): "qwen2",
    TEKKEN_SPLIT: "tekken",
    "ByteLevel": "gpt-2",
    "Digits ByteLevel": "smollm",
}
IGNORES_MERGES = ("llama-bpe", "tekken")
AS_MERGED = {"llama-bpe": "dbrx"}
# Texts that llama.cpp reads otherwise, by what of the tokenizer is behind it.
NOTES = {
    "NFC": "the tokenizer first composes characters (Unicode NFC), llama.cpp doesn't",
    "tekken": "words of capitals with accents are split otherwise by llama.cpp",
    "first": "a text that doesn't begin with a control token gets a space in front in transformers, not in llama.cpp",
    "strips": "spaces beside some control tokens are dropped by the tokenizer, and kept by llama.cpp",
    "always": "a text that begins with a space, or has one behind a control token, gets another in llama.cpp",
}
SPACE = "\u2581"  # SentencePiece's sign for a space
UNUSED_SCORE = -10_000.0  # below any piece's


@dataclass
class Vocabulary:
    """What a GGUF file says of the tokenizer; one entry an embedding row in `tokens`, `types` and `scores`."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    types: Sequence[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool | None = None  # "llama" only: whether a text gets a space in front
    notes: list[str] = field(default_factory=list)  # what differs elsewhere, for people


def describe(spec: dict[str, Any], rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer given as tokenizer.json's content, for a model with `rows` embeddings.

    Raises UserError where GGUF has no words for it.
    """
    model = spec["model"]
    if model["type"] != "BPE":
        raise refused(f"its tokenizer is of the type {model['type']}; BPE can be written")
    added = {token["id"]: token for token in spec["added_tokens"]}
    pieces = {index: piece for piece, index in model["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}
    if max(pieces) >= rows:
        raise refused(f"its tokenizer has the token {max(pieces)}, its embeddings have only {rows} rows")
    tokens = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [TokenType.NORMAL if index in pieces else TokenType.UNUSED for index in range(rows)]
    for index, token in added.items():
        types[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    found = (_sentencepiece if model.get("byte_fallback") else _byte_level)(spec, tokens, types)
    if any(token["lstrip"] or token["rstrip"] for token in added.values()):
        found.notes.append(NOTES["strips"])
    return found


def _byte_level(spec: dict[str, Any], tokens: list[str], types: list[TokenType]) -> Vocabulary:
    parts = _parts(spec["pre_tokenizer"], "pretokenizers")
    kinds = [part["type"] for part in parts]
    normalizers = [part["type"] for part in _parts(spec["normalizer"], "normalizers")]
    if kinds[-1:] != ["ByteLevel"] or parts[-1]["add_prefix_space"] or set(normalizers) - {"NFC"}:
        raise refused(f"its tokenizer begins with {', '.join([*normalizers, *kinds])}, which can't be written")
    split = " ".join(kinds)
    if kinds == ["Split", "ByteLevel"] and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
        split = parts[0]["pattern"].get("Regex", "")
    pre = SPLITS.get(split)
    if pre is None or parts[-1]["use_regex"] == (kinds[0] == "Split"):
        raise refused(f"its tokenizer splits texts by {split!r}, for which llama.cpp's name isn't known here")
    if not spec["model"].get("ignore_merges"):
        pre = AS_MERGED.get(pre, pre)
    if bool(spec["model"].get("ignore_merges")) != (pre in IGNORES_MERGES) and pre != "tekken":
        raise refused(f"its tokenizer splits texts as {pre} but treats merges otherwise (ignore_merges)")
    merges = [" ".join(pair) for pair in _merges(spec)]
    notes = [NOTES["NFC"]] if normalizers else []
    notes += [NOTES[pre]] if pre in NOTES else []
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, notes=notes)


def _sentencepiece(spec: dict[str, Any], tokens: list[str], types: list[TokenType]) -> Vocabulary:
    """Scores from the merges: what merges first scores highest, as in the SentencePiece model that merges come from."""
    ranks: dict[str, int] = {}
    pairs = _merges(spec)
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    vocabulary, known = spec["model"]["vocab"], set(pairs)
    # llama.cpp joins any two neighbours that make a piece.
    for piece in ranks:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise refused(f"its tokenizer doesn't merge {pair[0]!r} and {pair[1]!r}, which llama.cpp would")
    unknown = spec["model"]["unk_token"]
    scores = []
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = TokenType.UNKNOWN
        elif types[index] == TokenType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[index] = TokenType.BYTE
        if types[index] == TokenType.USER_DEFINED:
            tokens[index] = token.replace(SPACE, " ")
        special = types[index] in (TokenType.BYTE, TokenType.CONTROL, TokenType.UNKNOWN)
        scores.append(0.0 if special else -float(ranks[token] + 1) if token in ranks else UNUSED_SCORE)
    prefix, notes = _space_prefix(spec)
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=prefix, notes=notes)


def _space_prefix(spec: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether llama.cpp is to put a space before a text and after each control token."""
    normalizers = _parts(spec["normalizer"], "normalizers")
    before = _parts(spec["pre_tokenizer"], "pretokenizers")
    steps = [part["type"] for part in (*normalizers, *before)]
    if steps == ["Prepend", "Replace"]:
        return True, []
    # Gemma's split at spaces finds none: they have been replaced.
    splits = [part for part in before if part["type"] == "Split" and part["pattern"] == {"String": " "}]
    if steps == ["Replace"] or (
        steps == ["Replace", "Split"] and splits and normalizers[0]["pattern"]["String"] == " "
    ):
        return False, []
    if steps == ["Metaspace"] and not before[0]["split"]:
        scheme = before[0]["prepend_scheme"]
        return scheme == "always", [NOTES[scheme]] if scheme in NOTES else []
    raise refused(f"its tokenizer begins with {', '.join(steps)}, which can't be written")


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A step of tokenizer.json as the list of steps that it consists of."""
    return [] if step is None else step[name] if step["type"] == "Sequence" else [step]
