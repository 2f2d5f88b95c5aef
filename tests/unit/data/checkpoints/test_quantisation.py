"""What config.json alone tells of a quantised checkpoint, and the sentence for one that can't be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.data.checkpoints import quantisation
from adder.data.checkpoints.quantisation import METHODS, refuse_unknown, without_quantisation
from adder.data.model_types import ModelSettings
from adder.data.stage import MODEL

ROOT = Path(__file__).resolve().parents[4]
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.fixture
def with_libraries(monkeypatch):
    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"load_in_4bit": True}, "bitsandbytes_4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes_8bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "intel/auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "auto-round"),
    ],
)
def test_known_methods_are_taken_wherever_config_json_tells_of_them(settings, method):
    for config in (
        {"quantization_config": settings},
        {"compression_config": settings},
        {"text_config": {"quantization_config": settings, "hidden_size": 4}, "model_type": "gemma3"},
    ):
        found = quantisation.quantisation(config)
        assert found is not None and found.method == method and found.spoken == METHODS[method]
        refuse_unknown(config, "it")
        assert quantisation.quantisation(without_quantisation(config)) is None
    assert quantisation.quantisation({"model_type": "llama", "text_config": None}) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "quip"}, r"quantised \(quip\), and only bitsandbytes, 4 bit, .* can be dequantised here"),
        ({"quant_method": "torchao", "quant_type": "int4"}, "torchao"),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ only 4 bit in the form gemm"),
        ({"quant_method": "awq", "bits": 8}, "AWQ only 4 bit"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "not marlin"),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "not mx_fp"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "stored sparse"),
        ({**CT, "transform_config": {"config_groups": {"u": {}}}}, "rotated"),
    ],
)
def test_what_cannot_be_unpacked_is_refused_in_one_sentence(settings, words, with_libraries):
    with pytest.raises(UserError, match=f"model.source: org/it is .*{words}.*name its 16-bit model instead$") as told:
        refuse_unknown({"quantization_config": settings}, "org/it")
    assert "\n" not in str(told.value)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="compressed-tensors, is not installed here: pip install compressed-tensors"):
        refuse_unknown({"quantization_config": {"quant_method": "compressed-tensors"}}, "it")
    for method in ("fp8", "awq", "gptq"):
        refuse_unknown({"quantization_config": {"quant_method": method}}, "it")


def test_a_local_model_is_refused_before_any_job(tmp_path):
    settings = ModelSettings(source=str(tmp_path))
    assert MODEL.refuse is not None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(UserError, match="quip"):
        MODEL.refuse(settings, tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    MODEL.refuse(settings, tmp_path)


def test_looking_needs_no_torch():
    code = "import sys; import adder.data.checkpoints.quantisation, adder.data.stage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "workflow_scripts")})
