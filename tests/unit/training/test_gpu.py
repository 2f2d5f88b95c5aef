"""What only a CUDA device can show: run with `pytest -m gpu` on a machine that has one."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.core.choice import Choice
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.kernels import labelled_loss
from adder.training import base_model
from tiny import pack_rows, save_tiny_model, token_row, write_training_inputs
from training_stage import run_training, train_settings

pytestmark = pytest.mark.gpu
LENGTHS = (9, 130, 64, 5, 257)


def on_gpu(rows: list[dict]) -> dict:
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    return {name: value.cuda() if hasattr(value, "cuda") else value for name, value in batch.items()}


def gradients(model, batches: list[dict]) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        labelled_loss.labelled_losses(model, **batch).sum().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def load(folder, dtype: str):
    model, choices = base_model.load(folder, "lora", dtype, "cuda")
    return model, choices.attention.value


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (9, 3)])
def test_packing_isolates_examples(tmp_path, heads, groups):
    """bf16 gradients of a pack against fp32 ones of its examples apart: no further off than bf16 itself (3 %)."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": 32 * heads, "head_dim": 32}
    folder = save_tiny_model(tmp_path / "model", **shape)
    rows = [token_row(i, length) for i, length in enumerate(LENGTHS)]
    exact, attention = load(folder, "float32")
    assert attention == "adder_segments"
    reference = gradients(exact, [on_gpu(pack_rows([[row]])) for row in rows])
    packed_exact = gradients(exact, [on_gpu(pack_rows([rows]))])
    assert relative_error(packed_exact, reference) < 1e-4
    model, attention = load(folder, "bfloat16")
    if torch.cuda.get_device_capability() >= (8, 0):
        assert attention == "adder_triton"
    packed = gradients(model, [on_gpu(pack_rows([rows]))])
    apart = gradients(model, [on_gpu(pack_rows([[row]])) for row in rows])
    assert relative_error(packed, reference) < max(0.03, 1.5 * relative_error(apart, reference))


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_every_method_trains(tmp_path, method, dtype):
    inputs = write_training_inputs(tmp_path / "inputs", save_tiny_model(tmp_path / "model"))
    values = {"epochs": 8, "learning_rate": 1e-2, "effective_batch_size": 6, "compute_dtype": dtype}
    out = tmp_path / "out"
    out.mkdir()
    run_training(train_settings(method=method, **values), inputs, out, Progress.silent())
    summary, plan = read_json(out / "train.json"), read_json(out / "plan.json")
    assert summary["final_loss"] < summary["first_loss"]
    assert plan["micro_batch_size"]["value"] == 2
    assert plan["gradient_checkpointing"]["value"] is False
    if method == "qlora":
        assert ("nf4_values" in plan) == (plan["lora_products"]["value"] == "PEFT")


def test_quantised_training_keeps_fp32_adapters(tmp_path):
    inputs = write_training_inputs(tmp_path / "inputs", save_tiny_model(tmp_path / "model"))
    out = tmp_path / "out"
    out.mkdir()
    run_training(train_settings(epochs=1), inputs, out, Progress.silent())
    from safetensors.torch import load_file

    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_model_for_shards_is_quantised_by_the_gpu_and_waits_in_main_memory(tmp_path, monkeypatch):
    """The bytes of a model that is loaded onto the GPU, of which the GPU has a weight at a time.

    2 MiB: a weight is half a MiB in bf16, and all of them 14, or 3.5 packed.
    """
    monkeypatch.setattr(
        base_model.packed_attention, "choose_attention", lambda *_: Choice("sdpa", "tries nothing on the GPU")
    )
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_key_value_heads": 4}
    folder = save_tiny_model(tmp_path / "model", **shape)
    direct, _ = base_model.load(folder, "qlora", "bfloat16", "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    waiting, _ = base_model.load(folder, "qlora", "bfloat16", "cuda", in_shards=True)
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**20
    assert all(parameter.device.type == "cpu" for parameter in waiting.parameters())
    layers = base_model.four_bit_layers(waiting)
    for name, layer in base_model.four_bit_layers(direct).items():
        weight, like = layers[name].weight, layer.weight
        assert torch.equal(weight.data, like.data.cpu()), name
        assert torch.equal(weight.quant_state.absmax, like.quant_state.absmax.cpu()), name
