"""Names of layers in a sentence."""

from adder.training.layer_names import LISTED, listed


def test_a_long_list_is_cut_and_counted():
    names = [f"layer{number}" for number in range(LISTED + 3)]
    assert listed(names[:2]) == "layer0, layer1"
    assert listed(names[:LISTED]).endswith(f"layer{LISTED - 1}")
    assert listed(names).endswith(f"layer{LISTED - 1} and 3 more")
