"""What a model's config.json tells about lengths."""

import json

import numpy as np
import pytest

from adder.core.model_config import attention_share, context_length


def test_context_length_is_found_under_its_various_names(tmp_path):
    for config, expected in (
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 32768}}, 32768),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert context_length(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    assert context_length(tmp_path) is None


def test_attention_costs_more_the_longer_the_examples_are():
    # Llama-3.1-8B's shape: 218.1 M weights a layer, 4,096 wide.
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    assert attention_share(shape, np.array([1000])) == pytest.approx(4.096e6 / (4.096e6 + 218.1e6), rel=1e-3)
    many = attention_share(shape, np.array([1000] * 50))
    assert many == pytest.approx(attention_share(shape, np.array([1000])))  # no example sees another
    assert attention_share(shape, np.array([100_000])) > 0.6
    assert attention_share({}, np.array([10])) is None and attention_share(shape, np.array([], dtype=int)) is None
