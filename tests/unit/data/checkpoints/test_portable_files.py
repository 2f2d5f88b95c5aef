"""What transformers 5 writes, rewritten so that 4 reads the same."""

from adder.data.checkpoints.portable_files import TOKENIZER_FILES, portable_config, portable_tokenizer_config


def test_the_position_embedding_and_dtype_stand_under_both_names():
    written = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "use_cache": False}
    found = portable_config(written | {"_model_name_or_path": "Some name"})
    assert found == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "rope_theta": 1e5,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
    }


def test_scaled_and_partial_rotation_too():
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}
    found = portable_config({"rope_parameters": rope})
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert (found["rope_theta"], found["partial_rotary_factor"]) == (1e4, 0.5)


def test_each_kind_of_layer_and_each_part_of_a_model_that_sees():
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    found = portable_config({"text_config": {"rope_parameters": rope}, "vision_config": {"dtype": "float32"}})
    assert (found["text_config"]["rope_theta"], found["text_config"]["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in found["text_config"] and found["vision_config"]["torch_dtype"] == "float32"


def test_the_tokenizers_class_and_special_tokens_are_known_to_both():
    written = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<a>"],
        "is_local": True,
        "backend": "x",
    }
    assert portable_tokenizer_config(written | {"local_files_only": True, "pad_token": "<b>"}) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "pad_token": "<b>",
    }
    named = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert portable_tokenizer_config(named) == named


def test_which_files_make_a_tokenizer():
    for name in ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "tekken.json"):
        assert TOKENIZER_FILES.fullmatch(name)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md"):
        assert not TOKENIZER_FILES.fullmatch(name)
