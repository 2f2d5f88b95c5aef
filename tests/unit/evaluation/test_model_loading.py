"""How many replies are written at once, and what ends them."""

import pytest
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MambaConfig, MptConfig

from adder.evaluation.model_loading import UNBOUNDED, choose_batch_size, context_length, eos_ids, load_model


def test_the_batch_size_is_chosen_with_its_reason(tiny_model_dir):
    model = load_model(tiny_model_dir, "float32", "cpu")
    assert choose_batch_size("auto", model, 200, 100).value == 100
    assert choose_batch_size("auto", model, 3, 100).value == 3
    assert choose_batch_size(7, model, 200, 100).value == 7
    huge = choose_batch_size("auto", model, 200, 10**9)
    assert huge.value < 100 and "fit in memory" in huge.reason


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LlamaConfig(max_position_embeddings=512, **SMALL), 512),
        (GPT2Config(n_positions=128, n_embd=8, n_layer=1, n_head=2, vocab_size=16), 128),
        (MptConfig(max_seq_len=256, d_model=8, n_heads=2, n_layers=1, vocab_size=16), 256),
        (MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16), UNBOUNDED),
    ],
)
def test_a_model_takes_as_many_tokens_as_its_configuration_says(config, context):
    """Recurrent ones as many as come; none of these needs attention heads to be counted."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert context_length(model) == context and choose_batch_size("auto", model.to_empty(device="cpu"), 3, 9).value == 3


def test_whatever_model_or_tokenizer_ends_at_counts(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, "float32", "cpu"), AutoTokenizer.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id, model.config.eos_token_id = [7, 8], None
    assert eos_ids(model, tokenizer) == {7, 8, tokenizer.eos_token_id}
