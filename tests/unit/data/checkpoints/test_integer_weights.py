"""Integers of GPTQ, AWQ and AutoRound become the numbers that they were packed from."""

import pytest
import torch

from adder.data.checkpoints.integer_forms import AWQ_ORDER, Packing, packing
from adder.data.checkpoints.integer_weights import unpack, unpacked
from quantised_checkpoints import integers, packed_in_bits, packed_in_int32

INPUTS, OUTPUTS = 96, 32


@pytest.fixture(scope="module")
def weight():
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def stored(weight, bits: int, size: int, less: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As GPTQ stores it in groups of `size` inputs, zeros less `less`; and the values."""
    numbers, zeros, scales = integers(weight.T, bits, size)
    group = torch.arange(len(numbers)) // size
    values = (numbers - zeros[group]) * scales.float()[group]
    zeros = (zeros.long() - less) % 2**bits
    parts = {"qweight": packed_in_bits(numbers.T, bits).T, "qzeros": packed_in_bits(zeros, bits), "scales": scales}
    return {f"q_proj.{end}": part for end, part in parts.items()}, values.T


def of(settings=None, **more) -> Packing:
    return packing("gptq", {"group_size": 32, **(settings or {}), **more})


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_number_of_bits_is_read_off_the_shapes(weight, bits):
    numbers = torch.randint(0, 2**bits, (INPUTS, OUTPUTS), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpacked(packed_in_bits(numbers.T, bits).T, bits, 0).long(), numbers)
    for less, form in ((1, "gptq"), (0, "gptq_v2")):
        tensors, values = stored(weight, bits, 32, less)
        found = unpack("q_proj.weight", tensors, torch.float32, of(checkpoint_format=form))
        assert torch.equal(found, values)


def test_words_that_autoround_packed_are_read_as_it_reads_them():
    # 32 of 3 bits, from an export of auto-round 0.16.1, and what its own layer unpacks them to.
    words = torch.tensor([749906143, 1189272619, -1850039590], dtype=torch.int32)
    numbers = [7, 3, 3, 4, 2, 5, 4, 5, 4, 5, 4, 5, 2, 0, 7, 6, 2, 4, 3, 3, 4, 4, 6, 6, 2, 4, 2, 5, 3, 3, 4, 4]
    assert unpacked(words[:, None], 3, 0).flatten().tolist() == numbers


def test_awqs_order_of_columns_is_undone(weight):
    numbers, zeros, scales = integers(weight.T, 4, 32)
    parts = {"qweight": numbers, "qzeros": zeros}
    tensors = {f"q.{end}": packed_in_int32(some, 4, list(AWQ_ORDER)) for end, some in parts.items()} | {
        "q.scales": scales
    }
    found = unpack("q.weight", tensors, torch.float32, packing("awq", {"group_size": 32}))
    group = torch.arange(INPUTS) // 32
    assert torch.equal(found, ((numbers - zeros[group]) * scales.float()[group]).T)


def test_a_zero_of_nothing_is_stored_as_all_bits(weight):
    tensors, _ = stored(weight.abs() + 1, 4, 32)
    zeros = torch.zeros((3, OUTPUTS))
    tensors["q_proj.qzeros"] = packed_in_int32(torch.full_like(zeros, 15), 4)
    found = unpack("q_proj.weight", tensors, torch.float32, of())
    assert bool((found >= 0).all()) and not bool((found == 0).all())


def test_groups_are_as_long_as_config_json_says_also_where_the_last_is_shorter(weight):
    part = weight[:, :80]
    tensors, values = stored(torch.cat([part, part[:, -16:]], 1), 4, 32)
    tensors["q_proj.qweight"] = tensors["q_proj.qweight"][:10]  # of 96 inputs, 80
    found = unpack("q_proj.weight", tensors, torch.float32, of())
    assert torch.equal(found, values[:, :80])
    with pytest.raises(ValueError, match="3 groups of 64 don't fit 80 inputs"):
        unpack("q_proj.weight", tensors, torch.float32, of(group_size=64))
    whole, values = stored(weight, 4, INPUTS)
    assert torch.equal(unpack("q_proj.weight", whole, torch.float32, of(group_size=-1)), values)
    differing, values = stored(weight, 8, 48)
    assert torch.equal(unpack("q.weight", differing, torch.float32, of(dynamic={"+:q": {"bits": 8}})), values)


def test_what_contradicts_config_json_is_refused(weight):
    tensors, _ = stored(weight, 4, 32)
    middle = torch.full((3, OUTPUTS), 8.0)
    tensors["q_proj.qzeros"] = packed_in_int32(middle, 4)
    with pytest.raises(ValueError, match="zeros are 9 where symmetric weights of 4 bits have 8"):
        unpack("q_proj.weight", tensors, torch.float32, of(sym=True))
    unpack("q_proj.weight", tensors, torch.float32, of(sym=True, checkpoint_format="gptq_v2"))
    with pytest.raises(ValueError, match="g_idx, which tells it, is lacking"):
        unpack("q_proj.weight", tensors, torch.float32, of(desc_act=True))
    beyond = {**tensors, "q_proj.g_idx": torch.arange(INPUTS).int()}
    with pytest.raises(ValueError, match="no group from 0 to 2"):
        unpack("q_proj.weight", beyond, torch.float32, of())
    with pytest.raises(ValueError, match="don't fit"):
        unpack("q_proj.weight", {**tensors, "q_proj.scales": torch.ones(3, 16)}, torch.float32, of())
    with pytest.raises(KeyError, match="scales"):
        unpack("q_proj.weight", {"q_proj.qweight": tensors["q_proj.qweight"]}, torch.float32, of())
