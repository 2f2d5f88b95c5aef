"""Which tile each kernel takes on which card: what compiles there within its shared memory and without spills.

The tiles of Hopper (9.0) were found by timing on an H100 and an H200. Those of other cards are the nearest ones that
benchmarks/cards.py compiles for them without spilling; none was timed there. All are chosen here, by a card's compute
capability and the shared memory that one of its blocks may have.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The block of a matrix that a program of a kernel computes at a time, and how Triton is to compile that."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Card(NamedTuple):
    """What decides over tiles: AMD's capabilities are numbers of another kind, so the vendor comes first."""

    vendor: str  # "nvidia" or "amd"
    capability: tuple[int, int]
    shared_bytes: int  # that one block may have


KIB = 1024
# Shared memory a block by capability (CUDA C++ programming guide, technical specifications by compute capability).
SHARED_BYTES = {
    (7, 0): 96 * KIB,
    (7, 5): 64 * KIB,
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (12, 0): 99 * KIB,
    (12, 1): 99 * KIB,
}
HOPPER = Card("nvidia", (9, 0), SHARED_BYTES[9, 0])


def card_named(name: str) -> Card:
    """The card of a capability without its dot ("86"), or of an AMD architecture ("gfx942")."""
    if name.startswith("gfx"):
        return Card("amd", (int(name[3:-2]), int(name[-2], 16)), 64 * KIB)
    capability = int(name[:-1]), int(name[-1])
    return Card("nvidia", capability, SHARED_BYTES[capability])


@lru_cache
def card_of(device: torch.device) -> Card:
    """A CUDA (or ROCm) device's card; the interpreter on a CPU takes Hopper's tiles."""
    if device.type != "cuda":
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    vendor = "nvidia" if torch.version.hip is None else "amd"
    return Card(vendor, (properties.major, properties.minor), properties.shared_memory_per_block_optin)


def compiles(card: Card) -> bool:
    """Whether Triton compiles for this card at all."""
    return card.vendor == "amd" or card.capability >= (7, 5)


def multiplies(card: Card) -> bool:
    """Whether kernels with matmuls are for this card: on Turing and before, Triton (since 3.3) uses no tensor cores."""
    return card.vendor == "amd" or card.capability >= (8, 0)


def may_have_fp8(card: Card) -> bool:
    """Whether fp8 matmuls are worth a trial: NVIDIA's from Ada on. (An MI300 calls itself 9.4, with another fp8.)"""
    return card.vendor == "nvidia" and card.capability >= (8, 9)


class AttentionTiles(NamedTuple):
    """Tiles of attention forward, of the gradient to queries, and of that to keys and values.

    A tile's rows are a token's query heads one after the other, its columns keys.
    """

    forward: Tile
    dq: Tile
    dkdv: Tile


class AttentionCandidates(NamedTuple):
    """Tiles that compile without spills and fit, for each of the kernels, the first of which is taken untimed."""

    forward: tuple[Tile, ...]
    dq: tuple[Tile, ...]
    dkdv: tuple[Tile, ...]


# By the largest head size that they are for. Of some thirty settings each, those that were fast on an H100 for short
# chats, long documents and single lines.
WARPGROUP_ATTENTION = {
    64: AttentionCandidates((Tile(64, 64, 4, 2),), (Tile(64, 64, 4, 2),), (Tile(128, 64, 4, 2),)),
    128: AttentionCandidates((Tile(64, 64, 4, 2),), (Tile(64, 32, 4, 2),), (Tile(32, 64, 4, 3),)),
    256: AttentionCandidates((Tile(64, 32, 4, 2),), (Tile(64, 32, 4, 1),), (Tile(32, 32, 4, 2),)),
}
# Of some forty settings each, the largest that spill nothing on any of these cards and need no more than 99 KiB.
WARP_ATTENTION = {
    64: AttentionCandidates(
        (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
        (Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
        (Tile(64, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 128, 8, 2)),
    ),
    128: AttentionCandidates(
        (Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(32, 64, 4, 2)),
        (Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)),
        (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 4, 2)),
    ),
    256: AttentionCandidates(
        (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
        (Tile(32, 32, 4, 2),),
        (Tile(32, 32, 8, 2), Tile(16, 32, 4, 2)),
    ),
}
# What was found fastest on a card, by card and largest head size.
_fastest: dict[tuple[Card, int], AttentionTiles] = {}


def has_warpgroups(card: Card) -> bool:
    """Whether matmuls read their inputs from shared memory (9.0, 10.x), so that registers are left for sums."""
    return card.vendor == "nvidia" and (9, 0) <= card.capability < (12, 0)


def attention_tiles(card: Card, head_size: int) -> AttentionTiles:
    """The tiles that attention with such heads takes on a card: the fastest found there, else the first candidates."""
    largest, candidates = _attention_candidates(card, head_size)
    return _fastest.get((card, largest)) or AttentionTiles(*(tiles[0] for tiles in candidates))


def attention_candidates(card: Card, head_size: int) -> AttentionCandidates:
    """The tiles among which attention_tiles may choose on a card."""
    return _attention_candidates(card, head_size)[1]


def use_attention_tiles(card: Card, head_size: int, fastest: AttentionTiles) -> None:
    """Have attention_tiles give what was found fastest on a card."""
    _fastest[card, _attention_candidates(card, head_size)[0]] = fastest


def _attention_candidates(card: Card, head_size: int) -> tuple[int, AttentionCandidates]:
    table = WARPGROUP_ATTENTION if has_warpgroups(card) else WARP_ATTENTION
    return next((largest, candidates) for largest, candidates in table.items() if head_size <= largest)


def quantise_and_matmul_tile(card: Card, block_r: int) -> Tile:
    """The tile of fp8.quantise_and_matmul with a rank of at most `block_r`: as many stages as fit, up to four."""
    tile = Tile(64, 128, 4, 4)
    bytes_a_stage = 2 * (tile.block_m + block_r) * tile.block_n
    return tile._replace(num_stages=min(tile.num_stages, 1 + card.shared_bytes // bytes_a_stage))


def lora_swiglu_fp8_tile(rank: int) -> Tile:
    """The tile of swiglu.lora_swiglu_fp8, narrower with large ranks."""
    return Tile(16, 128 if rank <= 16 else 64, 4, 3)


def swiglu_backward_tile(rank: int) -> Tile:
    """The tile of swiglu.swiglu_backward, narrower with large ranks.

    Of 13 settings on an H100 good for all: with and without deferred LoRA, with dropout, at ranks 16 and 64. The three
    sums of ranks above 128 need the registers of more warps where they stand there beside the matmuls' inputs.
    """
    return Tile(32, 64 if rank <= 64 else 32, 8 if rank > 128 else 4, 2)


class DropoutTiles(NamedTuple):
    """Tiles of dropout_matmul, dropout_matmul_grad_a and add_dropout_matmul_grad_x."""

    matmul: Tile
    grad_a: Tile
    grad_x: Tile


def dropout_tiles(rank: int) -> DropoutTiles:
    """The tiles of dropout's matmuls; large ranks' sums as swiglu_backward_tile's."""
    warps = 8 if rank > 128 else 4
    return DropoutTiles(Tile(64, 64, warps, 3), Tile(64, 128, warps, 3), Tile(64, 128, 4, 3))


def decode_attention_tile(card: Card, head_size: int, element_size: int) -> Tile:
    """The tile of decode_attention: the keys that a program reads at a time, in as many stages as fit, up to three."""
    wide = element_size > 2
    keys = 32 if wide else 64
    bytes_a_stage = 2 * keys * head_size * element_size
    beside = 16 * KIB  # queries and scores
    return Tile(1, keys, 4, min(2 if wide else 3, 1 + (card.shared_bytes - beside) // bytes_a_stage))


def add_lora_and_rope_tile(card: Card, half_head: int) -> Tile:
    """The tile of rope.add_lora_and_rope: tokens, and half a head. One stage: most loops over ranks have one round."""
    return Tile(64, half_head, 8 if half_head > 64 and not has_warpgroups(card) else 4, 1)
