"""The choice between packs and padding."""

import numpy as np

from adder.packing.pack_or_pad import choose_packing

ARTICLE = np.array([180, 95, 310, 150, 220, 60, 400, 130, 275, 200])


def test_packs_are_weighed_against_batches_and_against_padding_to_the_full_length():
    packing = choose_packing(ARTICLE, 2048, 16)
    assert packing.value is True
    waste = {item["layout"]: round(100 * item["waste"], 1) for item in packing.alternatives}
    assert waste["padded to max_seq_length"] == 90.1 and waste["packed"] == 1.4
    assert "90.1%" in packing.reason and "10 examples fit into 1 sequence of 2048" in packing.reason


def test_packing_is_off_where_it_gains_nothing():
    assert choose_packing(np.full(100, 700), 768, 16).value is False  # no two fit
    assert choose_packing(np.array([20, 20, 20]), 2048, 16).value is False  # one pack, nearly all of it empty
    assert choose_packing(np.array([30]), 64, 16).value is False
    assert choose_packing(np.full(1000, 70), 128, 16, requested=True).value is True
    assert choose_packing(ARTICLE, 2048, 16, requested=False).value is False
