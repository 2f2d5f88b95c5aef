"""Loading the base: what it takes of main memory while it is quantised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.training import base_model, lora
from architectures import tiny_architecture
from gradient_cases import collate, gradients_of, relative_error
from merge_fixture import make_inputs, reply_in_this_process  # noqa: F401 (a fixture)
from merge_fixture import run as merge
from quantised_checkpoints import by_bitsandbytes, model_stage, tiny_model
from tiny import pack_rows, save_tiny_model, token_row, write_training_inputs
from training_stage import adapter_digests, small_settings, train_small

ROOT = Path(__file__).resolve().parents[3]
SHARD = 50_000_000  # bytes
LOAD = """
import json, sys, threading, time
from pathlib import Path
import bitsandbytes, torch
from adder.training import base_model

torch.set_num_threads(1)

def held():  # anonymous memory: mapped files can be dropped at any time
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

most, going = [0], True
def watch():
    while going:
        most[0] = max(most[0], held())
        time.sleep(0.002)

base_model.choose_nf4_values = lambda *_: base_model.Choice("dequantised in each product", "test")
thread = threading.Thread(target=watch)
thread.start()
model, _ = base_model.load(Path(sys.argv[1]), "qlora", "bfloat16", "cpu")
going = False
thread.join()
layers = base_model.four_bit_layers(model)
print(json.dumps({"after": held(), "most": most[0], "layers": len(layers)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_model_is_quantised_shard_by_shard(tmp_path):
    """Six shards of 50 MB in bf16: beside what stays, loading holds less than two of them at any time.

    What a matrix takes while it is quantised counts, some 20 bytes a number, 63 MB for the largest here.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
    source = save_tiny_model(tmp_path / "source", num_key_value_heads=4, **shape)
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) >= 5
    environment = {"PYTHONPATH": str(ROOT / "workflow_scripts"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 12 * 7
    assert found["most"] - found["after"] < 2 * SHARD, found


def quantised(folder: Path, dtype: str = "float32"):
    """The model in NF4 with its values not held dequantised, LoRA on top with B not zero."""
    chosen = base_model.choose_nf4_values
    base_model.choose_nf4_values = lambda *args: base_model.Choice("dequantised in each product", "test")
    try:
        model, _ = base_model.load(folder, "qlora", dtype, "cpu")
    finally:
        base_model.choose_nf4_values = chosen
    torch.manual_seed(0)
    model = lora.add_adapter(model, small_settings(lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("llama", None, ""),
        ("mixtral", 0.5, "holds its experts in tensors of three dimensions, such as model.layers.0.mlp.experts"),
        ("falcon", 0.0, "is the weight of a FalconLinear, and bitsandbytes quantises torch's own linear layers only"),
        ("mamba", 0.7, "has its weight read directly by MambaMixer"),
        ("gpt2", None, ""),
    ],
)
def test_what_nf4_leaves_as_it_is_is_said_with_its_share(tmp_path, name, share, reason):
    tiny_architecture(name).to(torch.bfloat16).save_pretrained(tmp_path)
    _, choices = base_model.load(tmp_path, "qlora", "float32", "cpu")
    left = choices.nf4_weights
    assert (left is None) == (share is None)
    if left is not None:
        assert int(left.value.partition("%")[0]) <= 100 * share and reason in left.reason


def test_an_evaluation_leaves_the_gradients_as_they_were(tiny_model_dir):
    """bitsandbytes repacks NF4 weights in a forward without gradients on AVX512-BF16 CPUs: gradients were garbage."""
    model = quantised(tiny_model_dir, "bfloat16")
    layers = base_model.four_bit_layers(model)
    assert len(layers) == 14
    # On CPUs without that instruction set the defect does not show, so the flag itself is part of the test.
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    batch = collate(pack_rows([[token_row(1, 40), token_row(2, 25)]]))
    with torch.autocast("cpu", torch.bfloat16):
        before = gradients_of(model, [batch])
        with torch.no_grad():
            model.eval()(input_ids=batch["input_ids"], use_cache=False)
            model.train()
        after = gradients_of(model, [batch])
    assert torch.equal(before, after)


def test_values_dequantised_once_give_the_same_gradients(tiny_model_dir):
    """Holding NF4 values is the same QLoRA: fp32, both multiply by the same numbers (1e-5 for the order of sums)."""
    batch = collate(pack_rows([[token_row(1, 40), token_row(2, 25)]]))
    model = quantised(tiny_model_dir)
    expected = gradients_of(model, [batch])
    base_model.hold_dequantised(model.get_base_model(), torch.float32)
    assert not base_model.four_bit_layers(model)
    assert relative_error(gradients_of(model, [batch]), expected) < 1e-5


def test_quantisation_is_nf4_with_double_quantisation(tiny_model_dir):
    for layer in base_model.four_bit_layers(quantised(tiny_model_dir)).values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A 16-bit model and the same as bitsandbytes stores it in 4 bit, each as the model stage leaves it."""
    folder = tmp_path_factory.mktemp("both")
    plain = tiny_model(folder / "plain")
    packed = by_bitsandbytes(plain, folder / "packed", **NF4, bnb_4bit_compute_dtype=torch.float16)
    model_stage(folder / "stage-plain", plain)
    model_stage(folder / "stage-packed", packed)
    return folder


def inputs_of(folder: Path, stage: Path) -> dict[str, Path]:
    inputs = write_training_inputs(folder, stage / "model", packs=4)
    return {**inputs, "model": stage}


def test_a_4_bit_checkpoint_gives_the_adapter_of_the_16_bit_model_quantised_the_same_way(both, tmp_path):
    settings = {"epochs": 1, "compute_dtype": "bfloat16", "eval_samples": 0, "samples": 0, "lora_dropout": 0.0}
    for name in ("plain", "packed"):
        train_small(inputs_of(tmp_path / f"inputs-{name}", both / f"stage-{name}"), tmp_path / name, **settings)
    weights = [adapter_digests(tmp_path / name)["adapter_model.safetensors"] for name in ("plain", "packed")]
    assert weights[0] == weights[1]
    losses = [(tmp_path / name / "metrics.jsonl").read_text().count("loss") for name in ("plain", "packed")]
    assert losses[0] == losses[1] > 0


def test_a_4_bit_checkpoint_is_not_quantised_once_more(both):
    packed, _ = base_model.load(both / "stage-packed" / "packed", "qlora", "float32", "cpu", in_shards=True)
    layers = base_model.four_bit_layers(packed)
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers.values()} == {torch.float32}  # not the checkpoint's
    values, _ = base_model.load(both / "stage-packed" / "model", "lora", "float32", "cpu")
    base_model.hold_dequantised(packed, torch.float32)
    for name, tensor in values.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor)


@pytest.mark.usefixtures("reply_in_this_process")
def test_what_was_trained_on_4_bit_weights_is_merged_into_their_values(both, tmp_path):
    """Merged and proved: nothing is measured to choose between two bases, since there is one."""
    inputs = make_inputs(tmp_path / "inputs", both / "stage-packed" / "model")
    inputs["model"] = both / "stage-packed"
    merge(inputs, tmp_path / "out", method="qlora")
    proof = read_json(tmp_path / "out" / "proof.json")
    assert proof["checked"] and proof["base"] is None and proof["changed_weights"] == proof["adapted_weights"] == 14


def test_4_bit_weights_that_transformers_holds_otherwise_are_refused(tmp_path, both):
    """As the experts of a mixture, which it joins into tensors of three dimensions."""
    for path in (both / "packed").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = read_json(tmp_path / "config.json")
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "model.layers.0.mlp.gate_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of the 14 .* transformers can load .*train.method: lora"):
        base_model.load(tmp_path, "qlora", "float32", "cpu")


def test_loftq_is_refused_where_the_weights_before_quantisation_are_not_there(both):
    model, _ = base_model.load(both / "stage-packed" / "packed", "qlora", "float32", "cpu")
    with pytest.raises(UserError, match="loftq makes up for .* this base came in 4 bit"):
        lora.add_adapter(model, small_settings(init_lora_weights="loftq"))


@pytest.mark.gpu
def test_a_gpu_holds_a_4_bit_checkpoint_as_it_holds_the_16_bit_model_quantised(tmp_path):
    """And what the model stage, on a CPU, makes of it in 16 bit are the values that the GPU computes with."""
    from bitsandbytes.functional import dequantize_4bit

    plain = tiny_model(tmp_path / "plain", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    packed = by_bitsandbytes(plain, tmp_path / "packed", "cuda", **NF4)
    model_stage(tmp_path / "stage", packed)
    quantised, _ = base_model.load(plain, "qlora", "bfloat16", "cuda")
    came, _ = base_model.load(tmp_path / "stage" / "packed", "qlora", "bfloat16", "cuda")
    values = base_model.load(tmp_path / "stage" / "model", "lora", "bfloat16", "cpu")[0].state_dict()
    layers = base_model.four_bit_layers(quantised)
    assert len(layers) == 7
    for name, layer in base_model.four_bit_layers(came).items():
        own, other = (one.weight.quant_state for one in (layer, layers[name]))
        assert torch.equal(layer.weight, layers[name].weight) and torch.equal(own.absmax, other.absmax)
        assert torch.equal(dequantize_4bit(layer.weight.data, own).cpu(), values[f"{name}.weight"])
