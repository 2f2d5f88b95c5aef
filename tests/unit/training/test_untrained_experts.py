"""What of a mixture of experts gets no LoRA pair is said with its share of the weights."""

import pytest

from adder.core.files import read_json
from adder.core.progress import Progress
from adder.training import base_model, lora
from adder.training.untrained_experts import left_untrained
from architectures import tiny_architecture
from tiny import tiny_tokenizer, write_training_inputs
from training_stage import run_training, small_settings, train_settings

# Of tiny Mixtral, by hand: 2 layers, 4 experts of 48 (gate, up, down) by 32, and attention of 2 · 32² + 2 · 32 · 16.
EXPERTS, ATTENTION, ROUTER = 2 * 4 * 3 * 48 * 32, 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * 4 * 32
WHOLE = EXPERTS + ATTENTION + ROUTER


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "model"
    model = tiny_architecture("mixtral", moe_intermediate_size=48)
    model.resize_token_embeddings(len(tiny_tokenizer()))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_share_is_that_of_the_weights_whatever_they_are_held_in(mixture, method):
    model, _ = base_model.load(mixture, method, "float32", "cpu", in_shards=True)
    choice = left_untrained(lora.add_adapter(model, small_settings(method=method)))
    assert choice is not None
    assert choice.value == f"{ATTENTION / WHOLE:.0%} of the matrices"
    assert f"the experts, {EXPERTS / WHOLE:.0%} of the numbers" in choice.reason and "mlp.experts." in choice.reason


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_nothing_is_said_of_models_without_experts(name):
    assert left_untrained(lora.add_adapter(tiny_architecture(name), small_settings(method="lora"))) is None


def test_it_is_said_before_training_and_stands_in_the_plan(mixture, tmp_path, capsys):
    inputs = write_training_inputs(tmp_path / "inputs", mixture, packs=2)
    settings = train_settings(method="lora", epochs=1, compute_dtype="float32", eval_samples=0, samples=0)
    run_training(settings, inputs, tmp_path / "out", Progress())
    said = [line for line in capsys.readouterr().err.splitlines() if "get no LoRA pairs" in line]
    assert len(said) == 1 and said[0].startswith("warning: train.target_modules: the experts")
    assert read_json(tmp_path / "out" / "plan.json")["lora_pairs"]["reason"] in said[0]
