"""Our kernels for packed attention: the blocks that they are given, and attention example by example."""

import pytest
import torch

from adder.kernels import packed_attention, packed_attention_triton, tiles, triton_utils
from kernel_cases import DEVICE, kernel, matmul_types


@pytest.mark.parametrize(("rows", "block", "first_is_longest"), [(1, 16, True), (4, 32, False), (3, 128, False)])
def test_every_block_of_every_example_is_listed_once_the_longest_first(rows, block, first_is_longest):
    """Against a plain loop over the examples; places that are left over come last and say so."""
    lengths = (9, 200, 3, 300, 127, 1, 64)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    table = packed_attention_triton.block_schedule(ends, sum(lengths), rows, block, first_is_longest)
    assert table.dtype == torch.int32 and table.shape[1] == 3
    counts = [-(-n * rows // block) for n in lengths]
    expected = {
        (start, length, i): count - i if first_is_longest else i
        for start, length, count in zip(ends.tolist(), lengths, counts, strict=False)
        for i in range(count)
    }
    found = [tuple(row) for row in table.tolist()]
    there, rest = found[: sum(counts)], found[sum(counts) :]
    assert set(there) == set(expected) and len(there) == len(expected)
    work = [expected[row] for row in there]
    assert work == sorted(work, reverse=True)
    assert all(index == -1 for *_, index in rest)


@kernel
@matmul_types
@pytest.mark.parametrize(
    ("heads", "groups", "size", "window", "cap"),
    [
        (4, 1, 128, None, None),
        (3, 3, 64, None, None),
        (6, 2, 80, 50, None),
        (9, 3, 64, None, 2.0),
        (2, 1, 256, 20, 5.0),
        (8, 2, 16, None, None) if triton_utils.INTERPRETED else (32, 8, 16, None, None),
    ],
)
def test_packed_attention_by_kernels_is_attention_example_by_example(dtype, heads, groups, size, window, cap):
    compare_with_segments(dtype, heads, groups, size, window, cap)


@kernel
@matmul_types
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 64), (4, 1, 128), (2, 1, 256)])
def test_other_cards_tiles_compute_the_same(monkeypatch, dtype, heads, groups, size):
    monkeypatch.setattr(tiles, "card_of", lambda device: tiles.card_named("86"))
    compare_with_segments(dtype, heads, groups, size, 20, 5.0)


def compare_with_segments(dtype, heads, groups, size, window, cap) -> None:
    """Output and gradients as relative norms against fp32: 0.005 in bf16, whose values are off by 2^-9 (weights,
    scores' gradients and results are each rounded once), an eighth of that in fp16. The same bits every time."""
    lengths = [70, 3, 1] if triton_utils.INTERPRETED else [70, 3, 1, 145, 700, 128, 65, 33]
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    # Side by side, as the joint matmul of a layer leaves them.
    wide = torch.randn(1, sum(lengths), heads + 2 * groups, size, generator=generator).to(DEVICE, dtype)
    gradient = torch.randn(1, sum(lengths), heads, size, generator=generator).to(DEVICE, dtype)
    options = {"cu_seq_lens_q": ends, "max_length_q": max(lengths), "sliding_window": window, "softcap": cap}

    def results(name: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.requires_grad_() for x in wide.to(kind).transpose(1, 2).split([heads, groups, groups], 1)]
        out = packed_attention.ATTENTION_FUNCTIONS[name](None, *leaves, None, **options)[0]
        return [out, *torch.autograd.grad(out, leaves, gradient.to(kind))]

    found, exact = results("adder_triton", dtype), results("adder_segments", torch.float32)
    errors = [((f.float() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
    print(errors)
    assert max(errors) < (5e-3 if dtype == torch.bfloat16 else 6e-4)
    assert all(map(torch.equal, found, results("adder_triton", dtype)))
