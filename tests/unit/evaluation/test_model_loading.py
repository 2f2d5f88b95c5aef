"""How many replies are written at once, and what ends them."""

from transformers import AutoTokenizer

from adder.evaluation.model_loading import choose_batch_size, eos_ids, load_model


def test_the_batch_size_is_chosen_with_its_reason(tiny_model_dir):
    model = load_model(tiny_model_dir, "float32", "cpu")
    assert choose_batch_size("auto", model, 200, 100).value == 100
    assert choose_batch_size("auto", model, 3, 100).value == 3
    assert choose_batch_size(7, model, 200, 100).value == 7
    huge = choose_batch_size("auto", model, 200, 10**9)
    assert huge.value < 100 and "fit in memory" in huge.reason


def test_whatever_model_or_tokenizer_ends_at_counts(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, "float32", "cpu"), AutoTokenizer.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id, model.config.eos_token_id = [7, 8], None
    assert eos_ids(model, tokenizer) == {7, 8, tokenizer.eos_token_id}
