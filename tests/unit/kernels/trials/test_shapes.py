"""Sizes are read of any configuration."""

from transformers import Gemma2Config, GPT2Config, LlamaConfig, MambaConfig

from adder.kernels.trials.shapes import of_config


def test_sizes_of_a_model_with_grouped_heads_and_of_its_adapter():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_attention_heads=8, num_key_value_heads=2, vocab_size=500
    )
    found = of_config(config, "bfloat16", rank=16, dropout=0.05, four_bit=True, fp8=True)
    assert (found.hidden, found.intermediate, found.heads, found.kv_heads, found.head_size) == (64, 160, 8, 2, 8)
    assert (found.vocabulary, found.rank, found.dropout, found.four_bit, found.fp8) == (500, 16, 0.05, True, True)
    assert (found.activation, found.cap, found.window) == ("silu", None, None)


def test_caps_windows_and_other_activations_are_seen():
    found = of_config(Gemma2Config(), "bfloat16")
    assert (found.activation, found.cap, found.head_size) == ("gelu_tanh", 50.0, 256) and found.window == 4096


def test_models_of_other_kinds_have_sizes_too():
    found = of_config(GPT2Config(n_embd=48, n_head=4), "float16")
    assert (found.hidden, found.intermediate, found.heads, found.kv_heads, found.head_size) == (48, 192, 4, 4, 12)
    assert of_config(MambaConfig(hidden_size=64), "float16").hidden == 64
