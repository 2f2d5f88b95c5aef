"""A GGUF file as a base: the model that was written comes out of it, or the file is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adder.core.errors import UserError
from adder.core.files import read_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.data.checkpoints.gguf_source import dequantise
from adder.export import gguf as gguf_file
from adder.export.stage import GgufSettings
from gguf_models import FAMILIES, save

IDS = torch.arange(3, 203)[None] % 200


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


# Architectures that transformers can't read out of a GGUF file.
UNKNOWN = ("olmo2", "smollm3", "granite")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNKNOWN])
def test_the_model_that_was_written_comes_out(tmp_path, family):
    """Scaled position embeddings, biases and head sizes of their own among them; weights are bf16 on both sides."""
    kind, changes = FAMILIES[family]
    folder = save(tmp_path / "merge", kind, **changes)
    (tmp_path / "gguf").mkdir()
    inputs = gguf_file.GgufInputs(merge=folder)
    gguf_file.run(GgufSettings(type="f32"), inputs, tmp_path / "gguf", Context(Progress.silent()))
    dequantise(tmp_path / "gguf" / "model.gguf", tmp_path / "out", Progress.silent())
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder / "model"), rtol=1e-4, atol=1e-4)


class Rewritten:
    """A GGUF file read and written anew, with some keys and tensors more, or fewer."""

    def __init__(self, source: Path, target: Path, keys=None, tensors=None, without=()) -> None:
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kind, sub_type=inner)
        for name, (value, kind) in (keys or {}).items():
            writer.add_key_value(name, value, kind)
        for tensor in reader.tensors:
            if tensor.name not in without:
                writer.add_tensor(tensor.name, np.array(tensor.data))
        for name, value in (tensors or {}).items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


FLOAT, STRING, COUNT = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"llama.rope.scaling.type": ("longrope", STRING)}}, "position embedding is scaled by 'longrope'"),
        ({"tensors": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "is scaled by rope_factors_long.weight"),
        ({"tensors": {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}}, "is none of Llama 3's kind"),
        ({"keys": {"llama.residual_scale": (0.5, FLOAT)}}, r"it says llama\.residual_scale = 0\.5, which isn't read"),
        ({"keys": {"llama.expert_count": (8, COUNT)}}, r"llama\.expert_count = 8"),
        ({"keys": {"split.count": (3, gguf.GGUFValueType.UINT16)}}, "one of 3 files"),
        (
            {"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
            r"has no place for its tensor blk\.0\.attn_s",
        ),
        ({"without": ("blk.1.ffn_up.weight",)}, r"it has no tensor for model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_what_has_no_place_here_is_refused(tiny_gguf, tmp_path, changes, message):
    Rewritten(tiny_gguf, tmp_path / "other.gguf", **changes)
    with pytest.raises(UserError, match=message):
        dequantise(tmp_path / "other.gguf", tmp_path / "out", Progress.silent())
    assert not (tmp_path / "out").exists()


def test_what_says_nothing_new_is_no_reason(tiny_gguf, tmp_path):
    neutral = {"llama.expert_count": (0, COUNT), "llama.rope.scaling.type": ("none", STRING)}
    Rewritten(tiny_gguf, tmp_path / "same.gguf", keys=neutral)
    dequantise(tmp_path / "same.gguf", tmp_path / "out", Progress.silent())
    assert read_json(tmp_path / "out" / "config.json")["rope_parameters"]["rope_type"] == "default"


def test_the_embedded_model_is_read_as_before(embedded_model_dir):
    """Its file says of nothing that isn't read."""
    config = read_json(embedded_model_dir / "config.json")
    assert config["rope_parameters"]["rope_theta"] == 100_000 and not config["attention_bias"]
