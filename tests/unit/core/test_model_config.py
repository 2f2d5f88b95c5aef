"""What a model's config.json tells about its kind and about lengths."""

import json

import numpy as np
import pytest

from adder.core.errors import UserError
from adder.core.model_config import attention_share, context_length, eos_ids, refuse_other_than_causal


def test_context_length_is_found_under_its_various_names(tmp_path):
    for config, expected in (
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 32768}}, 32768),
        ({"max_seq_len": 2048}, 2048),  # MPT
        ({"context_length": 1024}, 1024),  # RWKV
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


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": ["DiffusionGemmaForBlockDiffusion"]}, "DiffusionGemmaForBlockDiffusion"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "which encodes a text before"),
        ({"architectures": ["BertLMHeadModel"], "is_decoder": False}, "an encoder"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_its_config(config, what):
    with pytest.raises(UserError, match=f"model.source: me/it is .*{what}"):
        refuse_other_than_causal(config, "me/it")


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "Gemma3ForConditionalGeneration",
        "BloomModel",
        "IdeficsForVisionText2Text",
    ],
)
def test_what_may_be_one_is_not(name):
    refuse_other_than_causal({"architectures": [name]}, "me/it")
    refuse_other_than_causal({"model_type": "llama"}, "me/it")


@pytest.mark.parametrize(
    ("own", "config", "ids"),
    [
        ({"eos_token_id": [1, 2]}, 3, [1, 2]),
        ({"eos_token_id": 1}, 3, [1]),
        ({}, 3, [3]),
        (None, 3, [3]),
        (None, None, []),
    ],
)
def test_generation_stops_on_what_generation_config_says_before_config(tmp_path, own, config, ids):
    if own is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert eos_ids(tmp_path) == ids
