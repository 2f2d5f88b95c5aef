"""Weights of 2 to 8 bits packed in words of 32, as GPTQ, AWQ and AutoRound store them, made into numbers.

scale · (number − zero), by the group of the input (Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023,
arXiv:2306.00978). How many bits a weight has is read off the shapes, since these libraries let layers differ.
"""

from collections.abc import Mapping
from math import gcd

import torch

from adder.data.checkpoints.integer_forms import Packing

ENDS = (".qweight", ".qzeros", ".scales", ".g_idx")


def unpack(name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, packing: Packing) -> torch.Tensor:
    """The weight (outputs, inputs). Raises ValueError or KeyError for shapes that don't fit, or parts lacking."""
    own = {part.rpartition(".")[2]: tensor for part, tensor in tensors.items()}
    scales, words = own["scales"], own["qweight"]
    groups, outputs = scales.shape
    bits = _bits(own, packing)
    numbers = unpacked(words, bits, 0 if packing.packed == "inputs" else 1, packing.order)
    inputs = len(numbers)
    if numbers.shape[1] != outputs:
        raise ValueError(f"{list(words.shape)} words of {bits} bits don't fit {list(scales.shape)} scales")
    if "qzeros" in own:
        zeros = unpacked(own["qzeros"], bits, 1, packing.order)
        zeros = (zeros + packing.added) & (2**bits - 1)  # of 0 less 1, all bits are set
    else:
        zeros = torch.full((groups, outputs), 2 ** (bits - 1), dtype=torch.uint8)
    if packing.symmetric and abs(int(zeros[0, 0]) - 2 ** (bits - 1)) == 1 and bool((zeros == zeros[0, 0]).all()):
        raise ValueError(
            f"zeros are {int(zeros[0, 0])} where symmetric weights of {bits} bits have {2 ** (bits - 1)}: they are "
            "stored in another form than config.json says"
        )
    group = _groups(own.get("g_idx"), inputs, groups, packing)
    return ((numbers.float() - zeros.float()[group]) * scales.float()[group]).T.to(dtype)


def _bits(own: Mapping[str, torch.Tensor], packing: Packing) -> int:
    """Of a number: zeros and scales have one for each output and group."""
    outputs = own["scales"].shape[1]
    words = (own["qzeros"] if "qzeros" in own else own["qweight"]).shape[1]
    bits, odd = divmod(32 * words, outputs)
    if odd or not 2 <= bits <= 8 or (packing.order and bits != 4):
        raise ValueError(f"{words} words of 32 bits hold no {outputs} numbers of so many bits")
    return bits


def _groups(g_idx: torch.Tensor | None, inputs: int, groups: int, packing: Packing) -> torch.Tensor:
    """The group of each input."""
    if g_idx is not None:
        group = g_idx.long()
        if len(group) != inputs or not bool(((group >= 0) & (group < groups)).all()):
            raise ValueError(f"g_idx has no group from 0 to {groups - 1} for each of {inputs} inputs")
        return group
    if packing.reordered:
        raise ValueError("inputs are in another order (desc_act) and g_idx, which tells it, is lacking")
    size = packing.group_size if packing.group_size and packing.group_size > 0 else inputs
    if -(-inputs // size) != groups:
        size, odd = divmod(inputs, groups)
        if odd or packing.group_size is not None:
            raise ValueError(f"{groups} groups of {packing.group_size} don't fit {inputs} inputs")
    return torch.arange(inputs) // size


def unpacked(words: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The numbers (uint8) in int32 `words` along a dimension, from the lowest bits on; one may go on in the next word.

    order: the places of the numbers in a word, where they aren't as stored.
    """
    words = words.movedim(dim, 0)
    values, span = 32 // gcd(32, bits), bits // gcd(32, bits)
    if len(words) % span:
        raise ValueError(f"{len(words)} words can't be unpacked in {span}s, as numbers of {bits} bits are")
    blocks = words.reshape(-1, span, *words.shape[1:])
    numbers = torch.empty((len(blocks), values, *words.shape[1:]), dtype=torch.uint8)
    for number in range(values):
        word, shift = divmod(number * bits, 32)
        kept = min(bits, 32 - shift)
        value = (blocks[:, word] >> shift) & (2**kept - 1)
        if kept < bits:
            value = value | ((blocks[:, word + 1] & (2 ** (bits - kept) - 1)) << kept)
        numbers[:, order[number] if order else number] = value.to(torch.uint8)
    return numbers.flatten(0, 1).movedim(0, dim)
