"""Quantised checkpoints become the 16-bit model whose values their own libraries compute with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.core.safetensors_layout import shard_files
from adder.data.checkpoints import dequantise
from adder.data.checkpoints.quantisation import quantisation
from quantised_checkpoints import (
    by_bitsandbytes,
    fp8_blocks,
    integers,
    is_quantised,
    packed_in_int32,
    repacked,
    tell,
    tiny_model,
)

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("plain") / "model")


def dequantised(packed: Path, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    dequantise.dequantise(packed, out, "it", 1, Progress.silent())
    assert quantisation(read_json(out / "config.json")) is None
    return {name: t for file in shard_files(out) for name, t in load_file(out / file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def loads_as(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def fp8_in_blocks(weight):
    numbers, scales, values = fp8_blocks(weight, 32)
    return {"weight": numbers, "weight_scale_inv": scales}, values


def fp8_by_rows(weight):
    scales = weight.abs().amax(1, keepdim=True) / 448
    numbers = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scales, "input_scale_ub": torch.ones(1)}, numbers.float() * scales


def fp8_with_one_scale(weight):
    scale = weight.abs().max() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scale, "activation_scale": torch.ones(())}, numbers.float() * scale


def mxfp8(weight):
    """E4M3 numbers, and a byte for 32 of a row, which is the scale's exponent and 127 (OCP MX, version 1.0)."""
    blocks = weight.unflatten(1, (-1, 32))
    exponents = (blocks.abs().amax(2).clamp(min=1e-30).log2().floor() - 8).clamp(-127, 127)
    scales = exponents.exp2()[..., None]
    numbers = (blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = (numbers.float() * scales).flatten(1)
    return {"weight": numbers.flatten(1), "weight_scale_inv": (exponents + 127).to(torch.uint8)}, values


def gptq(weight):
    """Groups of 16 inputs, which stand in another order (desc_act)."""
    numbers, zeros, scales = integers(weight.T, 4, 16)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    group = (torch.arange(len(numbers)) // 16)[order]
    numbers = numbers[order]
    values = (numbers - zeros[group]) * scales.float()[group]
    packed = packed_in_int32(numbers.T, 4).T
    parts = {"qweight": packed, "qzeros": packed_in_int32(zeros - 1, 4), "scales": scales, "g_idx": group.int()}
    return parts, values.T


def awq(weight):
    numbers, zeros, scales = integers(weight.T, 4, 16)
    values = (numbers - zeros.repeat_interleave(16, 0)) * scales.float().repeat_interleave(16, 0)
    packed, own = (packed_in_int32(some, 4, AWQ_ORDER) for some in (numbers, zeros))
    return {"qweight": packed, "qzeros": own, "scales": scales}, values.T


@pytest.mark.parametrize(
    ("settings", "pack"),
    [
        (FP8, fp8_in_blocks),
        ({"quant_method": "fbgemm_fp8"}, fp8_by_rows),
        ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_with_one_scale),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}, gptq),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, awq),
    ],
    ids=lambda value: value.__name__ if callable(value) else value["quant_method"],
)
def test_values_are_those_that_were_packed(tmp_path, plain, settings, pack):
    expected = repacked(plain, tmp_path / "packed", settings, pack)
    found = dequantised(tmp_path / "packed", tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # AWQ's and GPTQ's values are sums of products in another order than ours.
        torch.testing.assert_close(found[name], values, rtol=1e-2 if pack in (awq, gptq) else 0, atol=0)
    assert loads_as(tmp_path / "out", found)


def test_mxfp8_is_what_transformers_makes_of_it(tmp_path):
    plain = tiny_model(tmp_path / "plain", intermediate_size=96)
    expected = repacked(plain, tmp_path / "packed", MXFP8, mxfp8)
    found = dequantised(tmp_path / "packed", tmp_path / "out")
    assert same(found, expected) and loads_as(tmp_path / "out", expected)
    config = FineGrainedFP8Config(weight_block_size=(1, 32), scale_fmt="ue8m0", dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.bfloat16, quantization_config=config
    ).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


def test_fp8_is_what_transformers_makes_of_it(tmp_path):
    plain = tiny_model(tmp_path / "plain", intermediate_size=96)  # whole blocks, which its code needs
    repacked(plain, tmp_path / "packed", FP8, fp8_in_blocks)
    found = dequantised(tmp_path / "packed", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_bitsandbytes_gives_the_values_that_it_computes_with(tmp_path, plain, settings):
    packed = by_bitsandbytes(plain, tmp_path / "packed", **settings)
    found = dequantised(packed, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}).dequantize().state_dict()
    assert sum(map(is_quantised, found)) == 14
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in theirs.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


def test_mxfp4_experts_are_unpacked(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
    config = AutoConfig.for_model("gpt_oss", **shape, **heads, layer_types=["full_attention"])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        sizes = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, sizes, generator=generator).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, sizes[:3], generator=generator).to(torch.uint8)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    tell(tmp_path / "packed", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    found = dequantised(tmp_path / "packed", tmp_path / "out")
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **options).state_dict()
    assert len(found) == len(theirs) and loads_as(tmp_path / "out", theirs)


@pytest.mark.parametrize(
    ("scheme", "packed_form"), [("FP8_DYNAMIC", "float-quantized"), ("W4A16", "pack-quantized"), ("W8A8", None)]
)
def test_compressed_tensors_are_what_its_library_makes_of_them(tmp_path, plain, scheme, packed_form):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from transformers import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    groups = {"group_0": {"targets": ["Linear"], **PRESET_SCHEMES[scheme]}}
    if scheme == "W4A16":
        groups["group_0"]["weights"].group_size = 16
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            size = module.weight.shape[1] // module.weight_scale.shape[1]
            most = {"FP8_DYNAMIC": 448, "W4A16": 7, "W8A8": 127}[scheme]
            own = module.weight.data.unflatten(1, (-1, size)).abs().amax(2) / most
            module.weight_scale.data.copy_(own)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "packed")
    compressor.update_config(tmp_path / "packed")
    found = dequantised(tmp_path / "packed", tmp_path / "out")
    said = read_json(tmp_path / "packed" / "config.json")["quantization_config"]
    assert packed_form is None or said["format"] == packed_form
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())
    assert loads_as(tmp_path / "out", found)


def test_files_are_of_bounded_size_whatever_came(tmp_path, plain, monkeypatch):
    expected = repacked(plain, tmp_path / "packed", FP8, fp8_in_blocks)
    monkeypatch.setattr(dequantise, "FILE_BYTES", 50_000)
    found = dequantised(tmp_path / "packed", tmp_path / "out")
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 150_000
    assert same(found, expected) and loads_as(tmp_path / "out", expected)


def test_what_came_and_what_it_became_is_told(tmp_path, plain, capsys):
    repacked(plain, tmp_path / "packed", FP8, fp8_in_blocks)
    (tmp_path / "out").mkdir()
    record = dequantise.dequantise(tmp_path / "packed", tmp_path / "out", "org/it", 1, Progress())
    assert record["method"] == "FP8 in blocks" and record["weights"] == 14 and not record["trained_as_it_is"]
    assert "dequantising org/it (FP8 in blocks): 14 weights" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, plain, monkeypatch):
    repacked(plain, tmp_path / "packed", FP8, fp8_in_blocks)
    (tmp_path / "out").mkdir()
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(dequantise.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"in 16 bit org/it takes 0\.\d GB"):
        dequantise.dequantise(tmp_path / "packed", tmp_path / "out", "org/it", 1, Progress.silent())
    assert not any((tmp_path / "out").iterdir())


def lacking(end):
    def damage(tensors):
        del tensors[next(name for name in tensors if name.endswith(end))]

    return damage


def wrong_scales(tensors):
    name = next(name for name in tensors if name.endswith("weight_scale_inv"))
    tensors[name] = torch.ones(7, 5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lacking("weight_scale_inv"), "has no scale"), (wrong_scales, "can't be dequantised from")],
)
def test_weights_that_are_not_understood_are_refused_by_name(tmp_path, plain, damage, words):
    repacked(plain, tmp_path / "packed", FP8, fp8_in_blocks)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(UserError, match=rf"proj.weight of it .*{words}"):
        dequantised(tmp_path / "packed", tmp_path / "out")


def test_a_model_that_says_it_is_quantised_and_is_not_is_refused(tmp_path, plain):
    shutil.copytree(plain, tmp_path / "packed")
    tell(tmp_path / "packed", FP8)
    with pytest.raises(UserError, match="no weight of it is"):
        dequantised(tmp_path / "packed", tmp_path / "out")


def test_packed_weights_of_a_model_that_tells_nothing_of_them_are_refused(tmp_path, plain):
    repacked(plain, tmp_path / "packed", FP8, fp8_in_blocks)
    config = read_json(tmp_path / "packed" / "config.json")
    del config["quantization_config"]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="in F8_E4M3, and its config.json doesn't say how"):
        dequantise.refuse_packed(tmp_path / "packed", "it")
    dequantise.refuse_packed(plain, "it")
