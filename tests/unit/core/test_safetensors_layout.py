"""Where tensors lie, by the headers alone, is where safetensors itself has them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from adder.core.errors import UserError
from adder.core.safetensors_layout import (
    DTYPES,
    INDEX,
    layout,
    parameter_count,
    shard_files,
    stored_tensors,
    total_bytes,
)

TENSORS = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


def test_bytes_of_a_tensor_are_found_in_the_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = layout(tmp_path / "model.safetensors")
    assert found.size == (tmp_path / "model.safetensors").stat().st_size
    content = (tmp_path / "model.safetensors").read_bytes()
    for stored in found.tensors:
        values = torch.frombuffer(bytearray(content[stored.start : stored.stop]), dtype=DTYPES[stored.dtype])
        assert torch.equal(values.view(stored.shape), TENSORS[stored.name])


def test_shards_count_together(tmp_path):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(TENSORS)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert shard_files(tmp_path) == ["0.safetensors", "1.safetensors"]
    assert stored_tensors(tmp_path).keys() == TENSORS.keys() and parameter_count(tmp_path) == 10
    assert total_bytes(tmp_path) == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors and no"):
        shard_files(tmp_path)
