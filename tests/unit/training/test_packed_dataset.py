"""Packs as training reads them."""

import numpy as np

from adder.training.packed_dataset import PackedExamples
from lengths_stage import examples_of, pack


def test_refilled_packs_keep_their_shape_and_every_example(tmp_path):
    lengths = np.random.default_rng(1).integers(20, 60, 300)
    found = pack(tmp_path, lengths)
    rows, first = found.rows, found.packs
    packs = PackedExamples(found.tokens, found.out / "packs.parquet", 0, True)
    seen = {}
    for epoch in (0, 1, 2, 1):
        packs.start_epoch(epoch)
        made = [packs.pack(number) for number in range(len(packs.seq_lengths))]
        assert [pack["seq_lengths"].tolist() for pack in made] == [pack["seq_lengths"].tolist() for pack in first]
        order = examples_of(rows, made)
        assert sorted(order) == list(range(300))
        assert seen.setdefault(epoch, order) == order  # an epoch that is started again is the same
    assert seen[0] == examples_of(rows, first) and seen[0] != seen[1] != seen[2]
