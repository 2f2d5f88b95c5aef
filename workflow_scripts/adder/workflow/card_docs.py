"""The table of graphics cards in docs/cards.md: what Adder uses on each, and on which it has been run."""

from typing import NamedTuple

from adder.core.machine import graphics_cards
from adder.core.precision import dtype_of_card
from adder.kernels import tiles

GIB = 2**30
GB = 10**9
# What a run was made on, and what benchmarks/cards.py compiles the kernels for (benchmarks/results/cards.json).
RUN_ON = ("H100", "H200")
COMPILED_FOR = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# QLoRA as counted here: tokens a micro-batch, every layer computed anew in backward, LoRA's rank on all projections.
TOKENS, RANK = 2048, 16
# CUDA's context and kernels, and the gaps that an allocator leaves, GiB.
OVERHEAD = 1.0
# Of a card's memory as it is sold, what a program gets.
USABLE = 0.97


class Shape(NamedTuple):
    """A model's sizes; `tied`: embeddings and LM head are one matrix."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False


# The largest first.
MODELS = {
    "Llama-3.1-70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "Qwen2.5-32B": Shape(64, 5120, 27648, 40, 8, 128, 152064),
    "Qwen2.5-14B": Shape(48, 5120, 13824, 40, 8, 128, 152064),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128256, True),
    "Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, True),
}


class Row(NamedTuple):
    """A card as people know it: its `name` in tiles.card_named, its memory in GB as it is sold."""

    called: str
    name: str
    gigabytes: int


CARDS = (
    Row("V100", "70", 16),
    Row("T4", "75", 16),
    Row("A100 40 GB", "80", 40),
    Row("A100 80 GB", "80", 80),
    Row("RTX 3060", "86", 12),
    Row("RTX 3090, A10G", "86", 24),
    Row("Jetson Orin", "87", 32),
    Row("RTX 4090, L4", "89", 24),
    Row("L40S", "89", 48),
    Row("H100", "90", 80),
    Row("H200", "90", 141),
    Row("B200", "100", 180),
    Row("RTX 5090", "120", 32),
    Row("DGX Spark", "121", 128),
    Row("MI300X", "gfx942", 192),
    Row("RX 7900 XTX", "gfx1100", 24),
)


def table() -> str:
    """Return the Markdown table of CARDS."""
    columns = "card, compute capability, dtype, attention, kernels, fused LoRA, fp8, largest model by QLoRA, tried"
    head = columns.split(", ")
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(_line, CARDS)])


def _line(row: Row) -> str:
    card = tiles.card_named(row.name)
    amd, multiplies = card.vendor == "amd", tiles.multiplies(card)
    capability = row.name if amd else f"{card.capability[0]}.{card.capability[1]}"
    dtype = dtype_of_card(graphics_cards.Card(0, row.called, card.capability, row.gigabytes * GB))
    cells = [
        row.called,
        capability,
        "bf16" if dtype.value == "bfloat16" else "fp16, scaled",
        "Adder's kernel" if multiplies else "each example by itself, by torch",
        "all" if multiplies else "those without matmuls" if tiles.compiles(card) else "none: not a target of Triton's",
        "yes" if multiplies else "with torch's matmuls" if tiles.compiles(card) else "no: PEFT's layers",
        "where a trial step agrees" if tiles.may_have_fp8(card) else "no",
        largest_model(row.gigabytes),
        _tried(row, capability),
    ]
    return f"| {' | '.join(cells)} |"


def _tried(row: Row, capability: str) -> str:
    if row.called in RUN_ON:
        return "run for real"
    return "compiled only" if capability in COMPILED_FOR else "not tried"


def largest_model(gigabytes: int) -> str:
    """The largest of MODELS that QLoRA fits into a card with so much memory; "–" for none."""
    return next((name for name, shape in MODELS.items() if qlora_bytes(shape) <= USABLE * gigabytes * GB), "–")


def qlora_bytes(shape: Shape, tokens: int = TOKENS) -> int:
    """Bytes that QLoRA takes at least: LoRA of RANK, `tokens` a micro-batch, every layer computed anew in backward.

    The sum of weights (NF4 with double quantisation 4.127 bits a value, embeddings and LM head 16 bits), LoRA with its
    gradient and AdamW's moments in fp32, each layer's input, one layer's insides and a chunk of logits.
    """
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_size
    layer = attention + 3 * shape.hidden * shape.mlp
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    outer = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    query = shape.heads * shape.head_size
    lora = shape.layers * RANK * (7 * shape.hidden + heads + query + 3 * shape.mlp)
    kept = 2 * tokens * shape.hidden * shape.layers
    inside = 2 * tokens * (3 * shape.mlp + 4 * shape.hidden + 2 * heads)
    logits = 2 * 2**28
    return int(shape.layers * layer * 4.127 / 8 + 2 * outer + 16 * lora + kept + inside + logits + OVERHEAD * GIB)
